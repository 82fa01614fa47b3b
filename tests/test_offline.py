"""Kernels compiled for GPUs that are not there: every variant compiles, fits the shared memory, and spills little."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import kernels
from benchmarks.offline import TARGETS, compiled, disassemblers
from hf_xent.ops import Head
from hf_xent.ops.problem import Problem

try:
    TRITON = version("triton")
except PackageNotFoundError:
    pytest.skip("needs triton", allow_module_level=True)

MATMULS = {"_target_fwd", "_stats_fwd", "_stats_bwd", "_survey", "_exp_matmul", "_dlogits_matmul"}
MEASURED = "3.7.1"  # the Triton whose compiler the numbers below come from; others need only compile and fit
# Spilled stores of 16-bit kernels on sm_90; variants that are not here have none.
SPILLS = {
    "streaming forward, odd sizes": 28,
    "streaming backward, bias and softcap": 9,
    "streaming backward, odd sizes": 201,
    "matmul exponentials, softcap": 33,
    "matmul exponentials, bias and softcap": 2,
    "matmul exponentials, all, odd sizes": 46,
    "matmul gradients, share and softcap": 89,
    "matmul gradients, bias and softcap": 23,
}
# Variants that this Triton does not compile: its pass `triton-nvidia-optimize-tmem-layouts` fails.
REFUSED = {
    "sm_100": {
        "bf16 matmul exponentials, softcap",
        "bf16 matmul exponentials, bias and softcap",
        "bf16 matmul exponentials, all, odd sizes",
        "bf16 matmul gradients, share and softcap",
    }
}
# The grid of each kernel of a plain variant on a GPU with 132 multiprocessors: 300 rows, 16384 columns, and 256 hidden.
GRIDS = {
    "_target_fwd": [3, 1, 1],
    "_stats_fwd": [3, 64, 1],
    "_stats_bwd": [3, 128, 1],
    "_survey": [128, 2, 1],
    "_row_statistics": [300, 1, 1],
    "_row_gradients": [300, 1, 1],
    "_column_sums": [128, 1, 1],
    "_scale_unless_one": [300, 1, 1],
    "_label_logits": [300, 1, 1],
    "_exp_matmul": [132, 1, 1],
    "_fold_tiles": [300, 1, 1],
    "_label_term": [300, 1, 1],
    "_dlogits_matmul": [132, 1, 1],
}


def compiled_and_fitting(target: str, selection: str, cache: Path) -> list[dict[str, Any]]:
    """The kernels of a selection, after a check that all compile but those known not to, and fit the shared memory."""
    records = compiled(target, selection, cache)
    errors = {record["variant"]: record["error"] for record in records if "error" in record}
    known = REFUSED.get(target, set()) if selection == "all" else set()
    assert set(errors) <= known, errors
    if TRITON == MEASURED:
        assert set(errors) == known, "a variant that was refused compiles: remove it from REFUSED"
    kernels = [record for record in records if "error" not in record]
    assert max(kernel["shared"] for kernel in kernels) <= TARGETS[target].shared
    return kernels


def check_hopper(kernels: list[dict[str, Any]]) -> None:
    """The 16-bit kernels of sm_90 use the tensor cores, and keep what they work on in registers."""
    low = [kernel for kernel in kernels if kernel["variant"].startswith(("bf16 ", "fp16 "))]
    assert low and {kernel["kernel"] for kernel in low if "HGMMA" in kernel["matrix"]} == MATMULS
    assert all("HGMMA" in kernel["matrix"] for kernel in low if kernel["kernel"] in MATMULS)
    if TRITON == MEASURED:
        spilled = {kernel["variant"]: kernel["spills"] for kernel in low if kernel["spills"]}
        more = {name: count for name, count in spilled.items() if count > SPILLS.get(name.partition(" ")[2], 0)}
        assert not more, f"{more} spilled stores, more than in SPILLS"


def test_plain_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """What cross-entropy launches in bfloat16, through Triton's own binding of arguments, with no GPU about."""
    kernels = compiled_and_fitting("sm_90", "plain", tmp_path)
    assert {kernel["kernel"]: kernel["grid"] for kernel in kernels} == GRIDS
    if disassemblers() is None:
        pytest.skip("compiled and fitting; registers need cuobjdump and nvdisasm, which this Triton does not bring")
    check_hopper(kernels)


@pytest.mark.compilation
@pytest.mark.parametrize("target", TARGETS)
def test_every_variant_compiles(target: str, tmp_path: Path) -> None:
    """Every dtype, option and odd size, for GPUs of two makers."""
    kernels = compiled_and_fitting(target, "all", tmp_path)
    names = {kernel["kernel"] for kernel in kernels}
    descriptors = {"_exp_matmul", "_dlogits_matmul", "_label_logits", "_fold_tiles", "_label_term"}
    assert names == (set(GRIDS) if TARGETS[target].descriptors else set(GRIDS) - descriptors)
    if TARGETS[target].backend == "cuda" and disassemblers() is None:
        pytest.skip("compiled and fitting; registers need cuobjdump and nvdisasm, which this Triton does not bring")
    low = [kernel for kernel in kernels if kernel["variant"].startswith(("bf16 ", "fp16 "))]
    assert all(kernel["matrix"] for kernel in low if kernel["kernel"] in MATMULS)
    if target == "sm_90":
        check_hopper(kernels)


def test_blocks_of_the_streaming_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide ones for the forward of 16-bit heads where the registers suffice; small ones where the memory does not."""
    streaming = pytest.importorskip("hf_xent.ops.gpu.streaming", reason="needs triton")
    blocks, wide_blocks = streaming.BLOCKS, streaming.FORWARD_BLOCKS

    def device_with(memory: int) -> None:
        utils = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": memory})
        driver = SimpleNamespace(active=SimpleNamespace(utils=utils))
        monkeypatch.setattr(streaming.triton.runtime, "driver", driver)

    def chosen(problem: Problem) -> tuple[Any, Any]:
        return streaming._blocks(problem, forward=True), streaming._blocks(problem)

    def problem(dtype: torch.dtype, D: int = 32, bias: bool = False, turned: bool = False) -> Problem:
        hidden, weight = torch.zeros(4, D, dtype=dtype), torch.zeros(48, D, dtype=dtype)
        weight = weight.T.contiguous().T if turned else weight
        head = Head(weight, torch.zeros(48, dtype=dtype) if bias else None, softcap=3.0)
        return Problem(hidden, head, torch.zeros(4, dtype=torch.int64), frozenset({"lse", "target", "entropy", "top"}))

    device_with(227 << 10)
    plain = problem(torch.bfloat16)
    assert chosen(plain) == (wide_blocks[2], blocks[2]) and wide_blocks[2].columns == 256
    ranked = replace(problem(torch.float16), outputs=frozenset({"lse", "target", "rank"}))
    turned = problem(torch.float16, turned=True)
    for heavy in (problem(torch.float16, D=40), problem(torch.float16, bias=True), ranked, turned):
        assert chosen(heavy) == (blocks[2], blocks[2])
    assert chosen(problem(torch.float32)) == (blocks[4], blocks[4])
    second = replace(plain, payload=(plain.hidden, plain.head))
    assert chosen(second) == (streaming.PAYLOAD_BLOCKS[2], streaming.PAYLOAD_BLOCKS[2])
    device_with(99 << 10)
    for small in (plain, second):
        assert chosen(small) == (streaming.SMALL_BLOCKS[2], streaming.SMALL_BLOCKS[2])


def test_page_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table for each dtype, with a column for each GPU; a variant that one of them cannot compile is marked."""
    taken = {"registers": 120, "spills": 3, "shared": 1536, "matrix": {"HGMMA": 4}}
    fits = {"variant": "bf16 streaming forward", "kernel": "_stats_fwd", **taken}
    less = {"variant": "fp32 scaling", "kernel": "_scale_unless_one", **taken, "spills": 0, "matrix": {}}
    fails = {"variant": "bf16 streaming forward", "kernel": "_stats_fwd", "error": "RuntimeError: no"}
    records = {"sm_80": [fits], "sm_90": [fits, less], "sm_100": [fails], "gfx942": []}
    monkeypatch.setattr(kernels, "disassemblers", lambda: Path("bin"))
    monkeypatch.setattr(kernels, "compiled", lambda target, selection, cache: records[target])
    text = kernels.page()
    cell = "120 regs, 3 spilled, 1.5 KiB, 4 HGMMA"
    assert f"\n## bf16\n\n| variant | kernel | {' | '.join(TARGETS)} |\n" in text
    assert f"\n| streaming forward | `_stats_fwd` | {cell} | {cell} | fails |  |\n" in text
    assert "\n## fp32\n" in text and "\n| scaling | `_scale_unless_one` |  | 120 regs, 1.5 KiB |  |  |\n" in text
    monkeypatch.setattr(kernels, "disassemblers", lambda: None)
    with pytest.raises(RuntimeError, match="install triton from PyPI"):
        kernels.page()

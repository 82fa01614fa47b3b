"""Two processes, stock and patched: the same losses, gradients and evaluation.

DDP runs under `accelerate launch` and transformers' Trainer. On CPU ranks accelerate does not shard (its distributed
type stays MULTI_CPU whatever is asked for), so FSDP2 is torch's `fully_shard`, applied as accelerate applies it.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import hf_xent
from support.models import assert_same_gradients, batch, gradients, tiny
from support.ranks import run_ranks

TESTS = Path(__file__).parent
# accelerate's own CPU launcher wants MPI; its GPU launcher is torchrun, and `use_cpu` keeps the ranks on the CPU
DDP = "--multi_gpu"
LAUNCHES = {  # flags of the launcher -> what is trained under them, one after the other
    DDP: {
        "DDP": {},
        "DDP, unused parameters looked for": {"unused": True},
        "DDP, a rank without labels": {"silent": True},
    },
    f"{DDP} --mixed_precision bf16": {"DDP, bf16": {}},
}
CASES = [(flags, name) for flags, runs in LAUNCHES.items() for name in runs]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Histories under a launcher's flags, by name: each launch takes seconds to begin, so that it makes several."""

    @cache
    def launch(flags):
        folder = tmp_path_factory.mktemp("launched")
        command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
        command += ["--num_cpu_threads_per_process", "1", "--main_process_port", "0", "--dynamo_backend", "no"]
        command += [
            *flags.split(),
            str(TESTS / "support" / "launched.py"),
            str(folder / "out.json"),
            json.dumps(LAUNCHES[flags]),
        ]
        path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path}
        found = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder)
        assert found.returncode == 0, found.stderr[-4000:]
        return json.loads((folder / "out.json").read_text())

    return launch


@pytest.mark.parametrize(("flags", "name"), CASES, ids=[name for _, name in CASES])
def test_training_on_two_ranks_equals_stock(flags, name, launched):
    stock, ours = launched(flags)[name]
    assert ours["class"] == stock["class"] == "DistributedDataParallel"
    rel = 2e-2 if "bf16" in name else 1e-4  # rounding of sums in bfloat16, four optimizer steps later
    for mine, theirs in zip(ours["logs"], stock["logs"], strict=True):
        assert mine == pytest.approx(theirs, rel=rel)
    assert ours["eval"] == pytest.approx(stock["eval"], rel=rel)
    assert ours["materialized"] == 0 and ours["streamed"] >= 8


def fsdp2(rank, name, parts, patched_first, options):
    """Losses and gradients of two steps and an evaluation, stock and patched; and how often ours streamed."""
    found = []
    for patched in (False, True):
        model, (ids, labels) = tiny(name), batch(rows=4)
        if patched and patched_first:
            hf_xent.patch(model)
        mesh = init_device_mesh("cpu", (2,))
        shard = lambda part: fully_shard(part, mesh=mesh, **options)  # noqa: E731, B023
        for part in (*model.model.layers, model.lm_head) if parts == "layers and head" else model.model.layers:
            shard(part)
        shard(model)
        if patched and not patched_first:
            hf_xent.patch(model)
        mine = slice(2 * rank, 2 * rank + 2)
        for _ in range(2):  # the second step starts from what the first one left
            loss = model(input_ids=ids[mine], labels=labels[mine]).loss
            loss.backward()
            found.append((loss.detach(), {name: g.full_tensor() for name, g in gradients(model).items()}))
        with torch.no_grad():
            found.append((model(input_ids=ids, labels=labels).loss, {}))
            found.append((model(input_ids=ids).logits, {}))
    state = hf_xent.patching.patch_state(model)
    return found, (state.streamed, state.materialized)


FSDP2 = {  # model, which parts are groups of their own, patched before sharding, options of fully_shard
    "root": ("llama", "layers", True, {}),
    "root, tied": ("llama tied", "layers", True, {}),
    "root, patched after": ("gemma2 softcap", "layers", False, {}),
    # the head's weight is freed after its forward, before the loss is taken
    "head apart": ("llama", "layers and head", True, {"reshard_after_forward": True}),
    "head apart, patched after": ("llama", "layers and head", False, {"reshard_after_forward": True}),
    "head apart, kept": ("llama", "layers and head", True, {"reshard_after_forward": False}),
    "bf16": ("llama", "layers and head", True, {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}),
}


def every_case(rank):
    return {case: fsdp2(rank, *arguments) for case, arguments in FSDP2.items()}


@pytest.fixture(scope="module")
def ranks_of_fsdp2(tmp_path_factory):
    return run_ranks(2, every_case, tmp_path_factory.mktemp("fsdp2"))


@pytest.mark.parametrize("case", FSDP2)
def test_fsdp2_equals_stock(case, ranks_of_fsdp2):
    for rank in ranks_of_fsdp2:
        found, counts = rank[case]
        assert counts == (3, 0)
        half = len(found) // 2
        for (value, grads), (ours, our_grads) in zip(found[:half], found[half:], strict=True):
            tolerance = {"rtol": 1e-2, "atol": 1e-2} if case == "bf16" else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(ours, value, **tolerance)
            assert_same_gradients(our_grads, grads, rtol=3e-2 if case == "bf16" else 2e-5)

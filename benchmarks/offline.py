"""Kernels compiled for GPUs that are not there: what each takes of registers and shared memory.

    python -m benchmarks.offline sm_90 plain     one line of JSON for every kernel that the plain variants launch

Triton's own host path binds and specializes the arguments, compiles, and checks the shared memory; only the driver is
replaced, by one that has no device. This takes a process of its own: whether kernels are interpreted is decided when
they are imported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
MATRIX = r"\b(?:HGMMA|HMMA|DMMA|UTC\w*MMA)\b"  # instructions of tensor cores, in the assembly of NVIDIA's GPUs


class Target(NamedTuple):
    """A GPU, as far as a compiler asks about it."""

    backend: str
    arch: int | str
    warp: int  # threads that run together
    shared: int  # bytes of shared memory that a program may have
    multiprocessors: int
    descriptors: bool  # whether it has the copy engine that `matmuls` loads and stores by


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10, 108, False),
    "sm_90": Target("cuda", 90, 32, 227 << 10, 132, True),
    "sm_100": Target("cuda", 100, 32, 227 << 10, 148, True),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10, 304, False),
}


def compiled(target: str, selection: str, cache: Path) -> list[dict[str, Any]]:
    """Every kernel of a selection of variants, compiled for a target in a new process, with what it takes.

    Args:
        target: One of TARGETS.
        selection: "plain" or "all".
        cache: A folder for Triton's cache.

    Returns:
        A record for every kernel; one that does not compile or does not fit has its name and "error" only.

    Raises:
        RuntimeError: If the process fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.offline", target, selection],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache)},
    )
    if done.returncode:
        raise RuntimeError(f"{target}: {done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def disassemblers() -> Path | None:
    """The folder of cuobjdump and nvdisasm, which come with Triton's wheel; None where it has none."""
    spec = find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
    return folder if all((folder / name).exists() for name in ("cuobjdump", "nvdisasm")) else None


def main(name: str, selection: str) -> None:
    """Print a line of JSON for every kernel, as soon as it is compiled."""
    target, launches = TARGETS[name], []
    _install(target, launches)
    from benchmarks import variants

    seen: set[int] = set()
    for variant, call in variants.of(selection, descriptors=target.descriptors):
        launches.clear()
        try:
            call()
        except Exception:  # whatever a compiler raises; the variants that follow are of interest all the same
            if not launches or "error" not in launches[-1]:
                raise
        for launch in launches:
            if "error" in launch:
                print(json.dumps({"variant": variant, **launch}), flush=True)
            elif id(launch["compiled"]) not in seen:  # Triton returns the same object for the same variant of a kernel
                seen.add(id(launch["compiled"]))
                print(json.dumps({"variant": variant, **_described(**launch)}), flush=True)


def _install(target: Target, launches: list[dict[str, Any]]) -> None:
    """Let Triton compile for the target and launch nothing; kernels that are launched are added to `launches`."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    from hf_xent.ops.gpu import streaming

    grids: list[tuple[int, ...]] = []
    properties = {"max_shared_mem": target.shared, "multiprocessor_count": target.multiprocessors}
    properties |= {"max_num_regs": 65536, "warpSize": target.warp}
    utils = SimpleNamespace(
        get_device_properties=lambda device: properties,
        load_binary=lambda *_: (1, 2, 255, 0, 1024),  # module, function, registers, spills, most threads
        unload_module=lambda *_: None,
    )
    driver = SimpleNamespace(
        utils=utils,
        launcher_cls=lambda source, metadata: lambda *arguments: grids.append(arguments[:3]),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_current_target=lambda: GPUTarget(target.backend, target.arch, target.warp),
    )
    triton.runtime.driver.set_active(driver)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=target.multiprocessors)
    streaming._check = streaming._blocks  # that the tensors are on a GPU is not checked
    run = triton.runtime.JITFunction.run

    def recorded(self: Any, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            kernel = run(self, *args, **options)
        except Exception as error:
            launches.append({"kernel": self.__name__, "error": f"{type(error).__name__}: {error}"})
            raise
        seconds = time.perf_counter() - start
        launches.append({"kernel": self.__name__, "compiled": kernel, "grid": grids.pop(), "seconds": seconds})
        return kernel

    triton.runtime.JITFunction.run = recorded


def _described(kernel: str, compiled: Any, grid: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """What is known of a compiled kernel; registers, spills and matrix instructions only with disassemblers."""
    record = {"kernel": kernel, "grid": grid, "seconds": round(seconds, 2), "shared": compiled.metadata.shared}
    if "amdgcn" in compiled.asm:
        return record | _from_amdgcn(compiled.asm["amdgcn"])
    if (folder := disassemblers()) is not None:
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / "kernel.cubin"
            file.write_bytes(compiled.asm["cubin"])
            usage, assembly = (
                subprocess.run([folder / tool, option, file], check=True, capture_output=True, text=True).stdout
                for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
            )
        found = re.search(r"REG:(\d+)", usage)
        assert found is not None, usage
        record |= {"registers": int(found[1]), "spills": len(re.findall(r"\bSTL\b", assembly))}
        record |= {"matrix": _counts(re.findall(MATRIX, assembly))}
    return record


def _from_amdgcn(assembly: str) -> dict[str, Any]:
    """The same from the assembly of AMD's GPUs; vector registers only, of both kinds."""
    numbers = dict(re.findall(r"\.((?:vgpr|agpr|vgpr_spill)_count):\s*(\d+)", assembly))
    return {
        "registers": int(numbers["vgpr_count"]),
        "spills": int(numbers["vgpr_spill_count"]),
        "matrix": _counts(["MFMA"] * len(re.findall(r"\bv_mfma_", assembly))),
    }


def _counts(names: Iterator[str] | list[str]) -> dict[str, int]:
    """How often each name is there."""
    names = list(names)
    return {name: names.count(name) for name in sorted(set(names))}


if __name__ == "__main__":
    main(*sys.argv[1:])

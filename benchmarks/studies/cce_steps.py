"""Training steps of one model under a limit of memory, in a process of its own; used by cce.py.

    python -m benchmarks.studies.cce_steps '{"model": "smollm2", "lora": false, "checkpointing": true, ...}'

The limit is the kernel's: RLIMIT_DATA, set once the weights, their gradients and the optimizer's state are there, to
what the process holds then and some room. An allocation beyond it fails, in torch as anywhere else. Weights are random:
memory and time do not depend on them.
"""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor

from hf_xent import planning
from hf_xent.bench.memory import PeakMemory, return_large_blocks
from hf_xent.patching import patched
from hf_xent.planning import shapes

STOCK, PATCHED = "stock", "patched"
MISSING = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "could not create a ")
OPTIMIZER = "adamw"


@dataclass(frozen=True)
class Training:
    """What is trained, and how."""

    model: Any
    lora: bool
    checkpointing: bool

    def __str__(self) -> str:
        name = self.model if isinstance(self.model, str) else self.model["model_type"]
        tuning, saved = "LoRA" if self.lora else "full", "checkpointing" if self.checkpointing else "no checkpointing"
        return f"{name}, {tuning}, {saved}"

    @property
    def options(self) -> dict[str, Any]:
        """Those of `hf_xent.planning.plan`; gradients are there when a step begins."""
        lora = {"peft": "lora", "lora_rank": 16} if self.lora else {}
        return {
            "dtype": "bf16",
            "gradient_checkpointing": self.checkpointing,
            "device": "cpu",
            "accumulation": 2,
            **lora,
        }

    def built(self) -> tuple[Any, Any]:
        """The model in bfloat16 with gradients, and its optimizer with its state."""
        settings = planning.Settings(self.model, **self.options).checked()
        torch.manual_seed(0)
        model = shapes.build(shapes.config_of(self.model), settings, device="cpu")
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
        with patched(model):
            step(model, torch.zeros(1, 8, dtype=torch.long))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return model, optimizer


def step(model: Any, ids: Tensor) -> None:
    """Forward and backward."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def patch_of(model: Any, arm: str) -> Any:
    """A context in which the model is that of an arm."""
    return patched(model) if arm == PATCHED else nullcontext()


def tries(training: Training, arm: str, rows: int, length: int, room: int) -> dict[str, float]:
    """One step in this process under a limit of memory: whether it fits, its peak, and seconds of CPU."""
    return_large_blocks()
    model, optimizer = training.built()
    ids = torch.randint(model.config.get_text_config().vocab_size, (rows, length))
    with patch_of(model, arm):
        step(model, ids[:1, :8])
        gc.collect()
        with PeakMemory() as memory:  # it gives back what is free before it starts
            limit(room)
            started = process_time()
            try:
                step(model, ids)
            except (RuntimeError, MemoryError) as error:
                if not any(text in str(error).lower() for text in MISSING) and not isinstance(error, MemoryError):
                    raise
                return {"fits": 0.0}
            seconds = process_time() - started
    del optimizer
    return {"fits": 1.0, "peak": float(memory.extra), "seconds": seconds}


def limit(room: int) -> None:
    """From now on, this process cannot hold more data than it does, and `room` bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    resource.setrlimit(resource.RLIMIT_DATA, ((int(line.split()[1]) << 10) + room, resource.RLIM_INFINITY))


def times(training: Training, rows: int, length: int, rounds: int) -> dict[str, float]:
    """Seconds of CPU of a step with and without the patch, in turn, and the median of their ratios in a round."""
    model, _ = training.built()
    ids = torch.randint(model.config.get_text_config().vocab_size, (rows, length))
    seconds: dict[str, list[float]] = {STOCK: [], PATCHED: []}
    for number in range(rounds + 1):  # the first warms up
        for arm in (STOCK, PATCHED) if number % 2 else (PATCHED, STOCK):
            with patch_of(model, arm):
                started = process_time()
                step(model, ids)
                seconds[arm].append(process_time() - started)
    ratios = [b / a for a, b in zip(seconds[STOCK][1:], seconds[PATCHED][1:], strict=True)]
    return {"ratio": median(ratios), **{name: median(values[1:]) for name, values in seconds.items()}}


def remote(task: str, training: Training, **options: Any) -> dict[str, float]:
    """`tries` or `times` in a fresh process; one that dies of a failed allocation does not fit."""
    text = json.dumps({"task": task, **asdict(training), **options})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.studies.cce_steps", text], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        found: dict[str, float] = json.loads(done.stdout.strip().split("\n")[-1])
        return found
    if done.returncode < 0 or any(text in done.stderr.lower() for text in MISSING):
        return {"fits": 0.0}
    raise RuntimeError(f"a step of {training} failed: {done.stderr[-2000:]}")


def main() -> None:
    """Runs the task of the command line, and prints its result."""
    options = json.loads(sys.argv[1])
    task = {"tries": tries, "times": times}[options.pop("task")]
    training = Training(*(options.pop(name) for name in ("model", "lora", "checkpointing")))
    print(json.dumps(task(training, **options)))


if __name__ == "__main__":
    main()

"""The process of a contestant: `serve` runs in it, and `Remote` is the handle of the parent process.

In separate processes, allocators, compilers and libraries of one contestant do not affect another. The parent requests
one iteration at a time, so that other load on the machine slows all alike.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..system.processes import Ended, Worker
from .contestants import Contestant
from .measured import Errors
from .memory import PeakMemory
from .methods import iterate

LOG = logging.getLogger(__name__)
SMALL = 32 << 20  # bytes of inputs below which an iteration takes milliseconds


class Failed(RuntimeError):
    """A contestant failed; the message is one line."""


class Remote:
    """The handle of the parent: `ask(method)` waits for the answer, or raises Failed with the contestant's error."""

    def __init__(self, worker: Worker):
        self.worker = worker

    def ask(self, method: str, *args: Any, seconds: float | None = None) -> Any:
        """The result of a method of the process's job. After `seconds` without an answer the process is killed."""
        try:
            self.worker.send((method, args))
            if not self.worker.pipe.poll(seconds):
                self.worker.process.kill()
                raise Failed(f"gave no answer within {seconds:g} s")
            succeeded, answer = self.worker.receive()
        except Ended as error:
            raise Failed(f"its process died with exit code {error.exitcode} (-9: out of memory)") from error
        if not succeeded:
            raise Failed(answer)
        return answer

    def close(self) -> None:
        """End the process."""
        self.worker.close()


def start(name: str, contestant: Contestant, folder: Path, device: str, threads: int) -> Remote:
    """Start the process of a contestant, whose job has the methods 'check', 'use', 'warm', 'time' and 'memory'."""
    small = (folder / "inputs.safetensors").stat().st_size < SMALL
    with _environment(**({"OMP_WAIT_POLICY": "PASSIVE"} if small else {})):
        return Remote(Worker(f"bench {name}", serve, contestant, folder, device, threads))


@contextmanager
def _environment(**defaults: str) -> Iterator[None]:
    """Set environment variables for the processes started in the block, unless the user has set them.

    By default, waiting threads of OpenMP spin for some milliseconds. On shared cores this keeps the working thread of
    another process from running, and iterations of milliseconds take ten times as long.
    """
    added = [name for name in defaults if name not in os.environ]
    os.environ.update({name: defaults[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def serve(pipe: Connection, contestant: Contestant, folder: Path, device: str, threads: int) -> None:
    """Answer the parent until it closes the pipe."""
    torch.set_num_threads(threads)
    answer(pipe, partial(_Job, contestant, folder, device))


def answer(pipe: Connection, make_job: Callable[[], object]) -> None:
    """Call the job's methods that the parent names, until it closes the pipe; errors are answers, too."""
    job = None
    while True:
        try:
            method, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            job = job or make_job()
            pipe.send((True, getattr(job, method)(*args)))
        except Exception as error:  # any error of a contestant becomes the note of its row
            LOG.debug("%s failed", method, exc_info=True)
            text = str(error).strip().split("\n")[0]
            pipe.send((False, f"{type(error).__name__}: {text}"[:200]))


class _Job:
    """One contestant with its own copy of the inputs. Gradients are deleted after every answer."""

    def __init__(self, contestant: Contestant, folder: Path, device: str):
        self.contestant, self.folder, self.device = contestant, folder, device
        # copied: safetensors maps files lazily, and page faults must not count as time or memory of the contestant
        inputs = {name: x.to(device, copy=True) for name, x in load_file(folder / "inputs.safetensors").items()}
        self.labels = inputs["labels"]
        self.hidden, self.weight = inputs["hidden"].requires_grad_(), inputs["weight"].requires_grad_()
        self.setting: dict[str, Any] = {}

    def check(self, settings: Mapping[str, dict[str, Any]]) -> dict[str, tuple[Errors, float]]:
        """Errors and seconds of every setting; of several settings, each has the faster of two warm iterations."""
        truth = load_file(self.folder / "truth.safetensors", device=self.device) if self.contestant.gated else {}
        checked = {}
        for label, setting in settings.items():
            self.use(setting)
            trials = [self._timed() for _ in range(3 if len(settings) > 1 else 1)]
            seconds, loss = min(trials[-2:], key=lambda trial: trial[0])
            results = {"loss": loss, "hidden": self.hidden.grad, "weight": self.weight.grad}
            checked[label] = ({name: relative_error(results[name], truth[name]) for name in truth}, seconds)
            self._drop()
        return checked

    def use(self, setting: dict[str, Any]) -> None:
        """Use a setting in all iterations from now on."""
        self.setting = setting

    def warm(self, iterations: int) -> None:
        """Run iterations without returning their times."""
        for _ in range(iterations):
            self._timed()
        self._drop()

    def time(self) -> float:
        """Seconds of one iteration."""
        if self.device == "cuda":
            self._timed()  # refill the allocator's pool, which was freed for the others, and raise the clock rate
        seconds, _ = self._timed()
        self._drop()
        return seconds

    def memory(self) -> int:
        """Peak bytes of one iteration beyond inputs and gradients."""
        self._drop()
        with PeakMemory(self.device) as memory:
            self._step()
        gradients = sum(
            x.grad.numel() * x.grad.element_size() for x in (self.hidden, self.weight) if x.grad is not None
        )
        self._drop()
        return max(0, memory.extra - gradients)

    def _step(self, **outputs: torch.Tensor) -> torch.Tensor:
        return iterate(self.contestant.loss, self.hidden, self.weight, self.labels, **self.setting, **outputs)

    def _timed(self) -> tuple[float, torch.Tensor]:
        self.hidden.grad = self.weight.grad = None
        outputs = self.contestant.outputs(self.hidden.detach(), self.weight.detach()) if self.contestant.outputs else {}
        self._wait()
        start = time.perf_counter()
        loss = self._step(**outputs)
        self._wait()
        return time.perf_counter() - start, loss

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _drop(self) -> None:
        self.hidden.grad = self.weight.grad = None
        if self.device == "cuda":
            torch.cuda.empty_cache()  # the next contestant is another process on the same device


def relative_error(result: torch.Tensor | None, truth: torch.Tensor) -> float:
    """Relative error in the Frobenius norm; infinite for a missing gradient."""
    if result is None or result.shape != truth.shape:
        return math.inf
    norm = torch.linalg.vector_norm
    return float(norm(result.float() - truth) / norm(truth))

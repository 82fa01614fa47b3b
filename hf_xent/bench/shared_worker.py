"""The process of a group of contestants: `serve_shared` runs in it.

It draws the inputs and computes the truth on the device once for all of its contestants, which then run one by one.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from .config import BenchConfig
from .contestants import BASE, CONTESTANTS, FLOOR, Contestant
from .inputs import Facts, on_device, truth
from .measured import Errors, Measured, allowed, passes, tolerance
from .memory import PeakMemory, free_bytes
from .methods import iterate, matmul_outputs
from .objectives import PLAIN
from .rows import ABSENT, WRONG
from .timer import time_calls
from .worker import answer, relative_error

YARD_REPEATS = 2  # of the bare matmuls before a contestant, and after it
TIMED_SECONDS = 3.0  # a contestant has fewer than the chosen repeats, but three, if these take longer


def serve_shared(pipe: Connection, threads: int) -> None:
    """Answer the parent until it closes the pipe."""
    torch.set_num_threads(threads)
    answer(pipe, SharedJob)


class SharedJob:
    """The inputs and the truth of a config, and the measurement of one contestant after another."""

    objective = PLAIN
    """Of the contestant that is measured."""

    def load(self, config: BenchConfig) -> Facts:
        """Draw the inputs of a config on its device."""
        self.unload()
        self.config = config
        tensors, self.facts = on_device(config)
        self.hidden, self.weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()
        self.labels = tensors["labels"]
        self.release()
        return self.facts

    def unload(self) -> None:
        """Free the inputs and the truth."""
        self.hidden = self.weight = self.labels = torch.empty(0)
        self.truth: tuple[str, dict[str, Tensor]] = ("", {})
        self.release()

    def release(self) -> None:
        """Free what the last contestant has left; raises an error if it has broken the process's context."""
        self.hidden.grad = self.weight.grad = None
        gc.collect()
        gc.freeze()  # the next collections, this one's and that of `PeakMemory`, look at what is new alone
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def measure(self, name: str, contestant: Contestant, objective: str, dense: Errors | None) -> Measured:
        """Gate, memory, warm-up and times of a contestant, whose function is that of the objective.

        Args:
            name: Its name; dense itself passes any gate.
            contestant: The contestant.
            objective: The objective of the truth.
            dense: The errors of dense, which the tolerance is made of; None if dense has not run.

        Returns:
            The measurements, with the ratio to the bare matmuls; the parent knows the time of dense.
        """
        self.objective = objective
        need, free = contestant.logits * self.facts.logits_bytes, free_bytes(self.config.device)
        if need > free:
            return Measured(
                status=ABSENT, note=f"needs about {need >> 30} GiB for the logits, {free >> 30} GiB are free"
            )
        if not contestant.gated:
            times = self.matmul_times(self.config.repeats)
            return Measured(times=times, ratios={FLOOR: [1.0]})
        trials = self.check(contestant, objective)
        bounds = allowed(contestant, tolerance(self.facts.dtype, dense))
        correct = [label for label in trials if name == BASE or passes(trials[label][0], bounds)]
        label = min(correct or trials, key=lambda label: trials[label][1])
        found = Measured(status="ok" if correct else WRONG, note=label, errors=trials[label][0])
        if correct:
            self.time(found, partial(self.step, contestant, self.settings(contestant)[label]))
        self.release()
        return found

    def check(self, contestant: Contestant, objective: str) -> dict[str, tuple[Errors, float]]:
        """Errors of every setting, and seconds of the faster of two warm iterations if there are several."""
        truth, settings = self.truth_of(objective), self.settings(contestant)
        checked = {}
        for label, setting in settings.items():
            results = {"loss": self.step(contestant, setting), "hidden": self.hidden.grad, "weight": self.weight.grad}
            errors = {name: relative_error(results[name], truth[name]) for name in truth}
            seconds = self.seconds(partial(self.step, contestant, setting), 2) if len(settings) > 1 else [0.0]
            checked[label] = (errors, min(seconds))
            results.clear()
            self.release()
        return checked

    def time(self, found: Measured, step: Callable[[], object]) -> None:
        """Memory, warm-up and times of a correct contestant, and the matmuls before and after it."""
        with PeakMemory(self.config.device) as memory:
            step()
        leaves = (self.hidden, self.weight)
        found.memory = max(0, memory.extra - sum(x.grad.nbytes for x in leaves if x.grad is not None))
        self.release()
        before = self.matmul_times(YARD_REPEATS)
        warm = self.seconds(step, max(1, self.config.warmup))
        repeats = max(3, min(self.config.repeats, int(TIMED_SECONDS / max(warm[-1], 1e-9))))
        found.times = self.seconds(step, min(repeats, self.config.repeats))
        self.release()
        yard = before + self.matmul_times(YARD_REPEATS)
        found.ratios = {FLOOR: [statistics.median(found.times) / statistics.median(yard)] if yard else []}

    def matmul_times(self, repeats: int) -> list[float]:
        """Seconds of the objective's bare matmuls after one untimed iteration; none if their logits do not fit."""
        if self.facts.logits_bytes + self.facts.weight_bytes > 0.9 * free_bytes(self.config.device):
            return []
        hidden, weight = self.hidden.detach(), self.weight.detach()
        outputs, matmuls = matmul_outputs(hidden, weight), CONTESTANTS[FLOOR].method(self.objective)
        assert matmuls is not None
        times = self.seconds(partial(matmuls, hidden, weight, self.labels, **outputs), 1 + repeats)[1:]
        outputs.clear()
        self.release()
        return times

    def step(self, contestant: Contestant, setting: dict[str, Any]) -> Tensor:
        """One iteration of a contestant; its gradients stay until the next one."""
        return iterate(contestant.loss, self.hidden, self.weight, self.labels, **setting)

    def seconds(self, call: Callable[[], object], repeats: int) -> list[float]:
        """The time of each call."""
        return time_calls(call, repeats, self.config.device)

    def settings(self, contestant: Contestant) -> dict[str, dict[str, Any]]:
        """The settings that a contestant may choose from."""
        return contestant.settings(self.config.device, self.facts.dtype, self.facts.N)

    def truth_of(self, objective: str) -> dict[str, Tensor]:
        """The truth of an objective; that of the last one is kept."""
        if self.truth[0] != objective:
            self.truth = ("", {})
            self.truth = (objective, truth(self.hidden, self.weight, self.labels, self.config.device, objective))
            self.release()
        return self.truth[1]

"""The benchmark: check the gradients first, then time one iteration of each contestant in turn.

Every contestant has its own process and must pass a gate before it is timed: the relative errors of its gradients
against the truth may be at most twice those of dense torch in the same dtype (or 1e-5, or the tolerance of an
approximate contestant). Then come warm-up, memory and rounds. In a round the parent requests one iteration of every
contestant, so that a loaded machine slows all alike, and takes the ratios to dense and to the bare matmuls. Where
memory is short, contestants run in groups, each of which includes dense and the matmuls.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import BenchConfig
from .contestants import BASE, CONTESTANTS, Contestant, for_objective
from .inputs import Facts, prepare
from .measured import REFERENCES, Errors, Measured, allowed, passes, to_row, tolerance
from .memory import free_bytes
from .rows import ABSENT, FAILED, WRONG, Row, environment
from .worker import Failed, Remote, start

Report = Callable[[str, int, int], None]  # the current step, steps done, steps in total
PROCESS_BYTES = 900 << 20  # a process with torch and a trainer library loaded; on CUDA, its context


def run(config: BenchConfig, report: Report | None = None) -> list[Row]:
    """Measure the contestants of a config.

    Args:
        config: The inputs, the contestants, and how often they run.
        report: Called as `report(step, steps_done, steps_in_total)` before every step.

    Returns:
        One row for each contestant, in the registry's order. An error of a contestant becomes the note of its row.

    Raises:
        ValueError: For inputs that cannot be loaded or generated.
    """
    names = config.names
    with tempfile.TemporaryDirectory(prefix="hf_xent-bench-") as folder:
        session = _Session(config, Path(folder), names, report or (lambda text, done, total: None))
        entries = {name: _Entry(name, for_objective(CONTESTANTS[name], config.objective)) for name in names}
        try:
            session.measure(entries)
        finally:
            for entry in entries.values():
                entry.close()
        measured_on = environment(config.device, config.threads)
        bounds, facts = session.tolerance, session.facts
        return [to_row(e.name, e.contestant, e, bounds, facts, config, measured_on) for e in entries.values()]


@dataclass
class _Entry(Measured):
    """The measurements of one contestant so far, and its process."""

    name: str
    contestant: Contestant
    remote: Remote | None = None

    def stop(self, status: str, note: str) -> None:
        """End the measurement of this contestant; its row has this status and note."""
        self.status, self.note = status, note
        self.close()

    def close(self) -> None:
        if self.remote is not None:
            self.remote.close()
            self.remote = None


class _Session:
    """One run: its inputs, its tolerances and its steps."""

    def __init__(self, config: BenchConfig, folder: Path, names: list[str], report: Report):
        self.config, self.folder, self.report = config, folder, report
        others = sum(name not in REFERENCES for name in names)
        self.done, self.total = 0, 1 + 2 * len(names) + others * config.repeats
        self.step("inputs and truth")
        self.facts: Facts = prepare(config, folder)
        if config.device == "cuda":
            torch.cuda.empty_cache()
        self.tolerance = tolerance(self.facts.dtype, None)  # used if dense itself cannot run

    def step(self, text: str, steps: int = 1) -> None:
        """Report the next step, and count its steps as done."""
        self.report(text, self.done, self.total)
        self.done += steps

    def measure(self, entries: dict[str, _Entry]) -> None:
        """Measure all entries, group by group."""
        references = [entry for name, entry in entries.items() if name in REFERENCES]
        self.start(references)
        errors = entries[BASE].errors
        if errors is not None:
            self.tolerance = tolerance(self.facts.dtype, errors)
        others = [entry for name, entry in entries.items() if name not in REFERENCES]
        size = self.group_size()
        for first in range(0, max(1, len(others)), size):
            group = others[first : first + size]
            self.start(group)
            self.rounds([*references, *group])
            for entry in group:
                entry.close()
        self.report("done", self.total, self.total)

    def group_size(self) -> int:
        """How many contestants fit into memory beside dense: each holds its inputs, and one at a time iterates."""
        free = self.free()
        iteration = 2 * self.facts.weight_bytes + 3 * self.facts.logits_bytes
        return max(1, int((0.8 * free - iteration) // (PROCESS_BYTES + self.facts.weight_bytes)))

    def free(self) -> int:
        """Bytes free on the device."""
        return free_bytes(self.config.device)

    def start(self, group: list[_Entry]) -> None:
        """Start the processes, all at once; then run gate, warm-up and memory one by one."""
        config = self.config
        for entry in group:
            reason = entry.contestant.available(config.device) or self.too_large(entry.contestant)
            if reason:
                entry.stop(ABSENT, reason)
            else:
                entry.remote = start(entry.name, entry.contestant, self.folder, config.device, config.threads)
        for entry in group:
            self.step(f"{entry.name}: gate, memory, warm-up", 2)
            if entry.remote is not None:
                try:
                    self.gate(entry, entry.remote)
                except Failed as error:
                    entry.stop(FAILED, str(error))

    def too_large(self, contestant: Contestant) -> str | None:
        """The reason to skip a dense method: if memory runs out, the system may kill the process of another one."""
        need, free = contestant.logits * self.facts.logits_bytes, self.free()
        return f"needs about {need >> 30} GiB for the logits, but {free >> 30} GiB are free" if need > free else None

    def gate(self, entry: _Entry, remote: Remote) -> None:
        """Check every setting; the fastest correct one is used, warmed up, and its memory measured."""
        settings = entry.contestant.settings(self.config.device, self.facts.dtype, self.facts.N)
        trials: dict[str, tuple[Errors, float]] = remote.ask("check", settings)
        bounds = allowed(entry.contestant, self.tolerance)
        exempt = entry.name == BASE or not entry.contestant.gated
        correct = [label for label in trials if exempt or passes(trials[label][0], bounds)]
        label = min(correct or trials, key=lambda label: trials[label][1])
        entry.errors, entry.note = trials[label][0] or None, label
        if not correct:
            entry.stop(WRONG, label)
            return
        remote.ask("use", settings[label])
        if trials[label][1] < self.config.patience / 20:  # a warm-up does not matter for longer iterations
            remote.ask("warm", self.config.warmup)
        if entry.contestant.gated:  # of the floor only the time is measured
            entry.memory = remote.ask("memory")

    def rounds(self, group: list[_Entry]) -> None:
        """Time one iteration of each in every round; the order rotates, so that none always follows the same one."""
        spent = {entry.name: 0.0 for entry in group}
        for number in range(self.config.repeats):
            shift = number % len(group)
            times: dict[str, float] = {}
            for entry in [*group[shift:], *group[:shift]]:
                self.step(f"round {number + 1}: {entry.name}", entry.name not in REFERENCES)
                if entry.remote is None or (number >= 3 and spent[entry.name] > self.config.patience):
                    continue
                try:
                    times[entry.name] = seconds = entry.remote.ask("time")
                    spent[entry.name] += seconds
                    entry.times.append(seconds)
                except Failed as error:
                    entry.stop(FAILED, str(error))
            for entry in group:
                for name in REFERENCES:
                    if entry.name in times and name in times:
                        entry.ratios[name].append(times[entry.name] / times[name])

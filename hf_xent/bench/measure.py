"""The benchmark: check the gradients first, then time one iteration of each contestant in turn.

Every contestant has its own process and must pass a gate before it is timed: the relative errors of its gradients
against the truth may be at most twice those of dense torch in the same dtype (or 1e-5, or the tolerance of an
approximate contestant). Then come warm-up, memory and rounds. In a round the parent requests one iteration of every
contestant, so that a loaded machine slows all alike, and takes the ratios to dense and to the bare matmuls. Where
memory is short, contestants run in groups, each of which includes dense and the matmuls.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from .config import BenchConfig
from .contestants import BASE, CONTESTANTS, FLOOR, Contestant
from .inputs import Facts, prepare
from .rows import ABSENT, FAILED, OK, WRONG, Row, environment
from .worker import Errors, Failed, Remote

Report = Callable[[str, int, int], None]  # the current step, steps done, steps in total
REFERENCES = (BASE, FLOOR)  # in every group: the times of the others are compared with theirs
PROCESS_BYTES = 900 << 20  # a process with torch and a trainer library loaded; on CUDA, its context
ATOL = 1e-5


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
    names = [name for name in CONTESTANTS if name == BASE or not config.contestants or name in config.contestants]
    with tempfile.TemporaryDirectory(prefix="hf_xent-bench-") as folder:
        session = _Session(config, Path(folder), names, report or (lambda text, done, total: None))
        entries = {name: _Entry(name, CONTESTANTS[name]) for name in names}
        try:
            session.measure(entries)
        finally:
            for entry in entries.values():
                entry.close()
        measured_on = environment(config.device, config.threads)
        return [_row(entry, session, measured_on) for entry in entries.values()]


@dataclass
class _Entry:
    """The measurements of one contestant so far."""

    name: str
    contestant: Contestant
    status: str = OK
    note: str = ""
    remote: Remote | None = None
    errors: Errors | None = None
    memory: int | None = None
    times: list[float] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in REFERENCES})

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
        minimum = ATOL if self.facts.dtype == torch.float32 else 2 * torch.finfo(self.facts.dtype).eps
        self.tolerance = {"hidden": minimum, "weight": minimum}  # used if dense itself cannot run

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
            self.tolerance = {name: max(2 * errors[name], ATOL) for name in self.tolerance}
        others = [entry for name, entry in entries.items() if name not in REFERENCES]
        size = self.group_size()
        for start in range(0, max(1, len(others)), size):
            group = others[start : start + size]
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
        return torch.cuda.mem_get_info()[0] if self.config.device == "cuda" else psutil.virtual_memory().available

    def start(self, group: list[_Entry]) -> None:
        """Start the processes, all at once; then run gate, warm-up and memory one by one."""
        config = self.config
        for entry in group:
            reason = entry.contestant.available(config.device) or self.too_large(entry.contestant)
            if reason:
                entry.stop(ABSENT, reason)
            else:
                entry.remote = Remote(entry.name, entry.contestant, self.folder, config.device, config.threads)
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
        exempt = entry.name == BASE or not entry.contestant.gated
        correct = [label for label in trials if exempt or self.passes(entry.contestant, trials[label][0])]
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

    def passes(self, contestant: Contestant, errors: Errors) -> bool:
        """Whether the errors of both gradients are within the tolerance; NaN is not."""
        return all(errors[name] <= bound for name, bound in self.allowed(contestant).items())

    def allowed(self, contestant: Contestant) -> Errors:
        """The largest allowed errors of its gradients: its tolerance or that of the run, whichever is larger."""
        return {name: max(bound, contestant.tolerance) for name, bound in self.tolerance.items()}

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


def _row(entry: _Entry, session: _Session, measured_on: dict[str, Any]) -> Row:
    facts, errors = session.facts, entry.errors or {}
    median = statistics.median(entry.times) if entry.status == OK and entry.times else None
    memory = entry.memory if entry.status == OK else None
    ratios = {name: statistics.median(values) for name, values in entry.ratios.items() if values and median is not None}
    allowed = session.allowed(entry.contestant) if entry.contestant.gated else {}
    return Row(
        contestant=entry.name,
        status=entry.status,
        time_ms=None if median is None else 1e3 * median,
        iqr_ms=None if median is None else 1e3 * _iqr(entry.times),
        repeats=len(entry.times),
        tokens_per_s=None if median is None else facts.N / median,
        time_ratio=ratios.get(BASE),
        matmul_ratio=ratios.get(FLOOR),
        peak_mib=None if memory is None else memory / 2**20,
        peak_ratio=None if memory is None else memory / facts.logits_bytes,
        loss_error=errors.get("loss"),
        hidden_error=errors.get("hidden"),
        weight_error=errors.get("weight"),
        hidden_tolerance=allowed.get("hidden"),
        weight_tolerance=allowed.get("weight"),
        note=entry.note,
        N=facts.N,
        V=facts.V,
        D=facts.D,
        dtype=session.config.dtype,
        source=facts.source,
        **measured_on,
    )


def _iqr(times: list[float]) -> float:
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low

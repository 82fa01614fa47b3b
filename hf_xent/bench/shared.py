"""The benchmark where contestants share processes, for GPUs: `run_shared`.

A GPU has memory for few processes, and each takes seconds to start. So the contestants of a group share one, which
draws the inputs on the device, and they run one by one. If one crashes, the group goes on in a new process without it.
Each row is in the journal before the next contestant starts.

The group of dense comes first: its errors and its time are those that all others are compared with.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from ..system.processes import Worker
from .config import BenchConfig
from .contestants import BASE, CONTESTANTS, GROUPS, for_objective
from .inputs import Facts, shaped_facts
from .journal import Journal
from .measure import Report
from .measured import GRADIENTS, Errors, Measured, to_row, tolerance
from .objectives import PLAIN
from .rows import ABSENT, FAILED, Row, environment
from .shared_worker import serve_shared
from .worker import Failed, Remote

LOAD_SECONDS = 240.0  # for a process to start and to draw its inputs


def run_shared(
    configs: Sequence[BenchConfig],
    journal: Journal | None = None,
    report: Report | None = None,
    limit: float = float("inf"),
) -> Iterator[list[Row]]:
    """Measure the contestants of several configs, which share device and threads.

    Args:
        configs: The configs; those that follow one another and differ in their objective alone share inputs.
        journal: Where rows are kept; those that it has are not measured again. None: in memory.
        report: Called as `report(step, steps_done, steps_in_total)` before every step.
        limit: Seconds after which no further contestant starts.

    Returns:
        The rows of one config after another; those that the limit has left no time for are missing.
    """
    run = _Run(configs, journal or Journal(), report or (lambda text, done, total: None), limit)
    try:
        for _, same in groupby(configs, key=lambda config: replace(config, objective=PLAIN)):
            yield from run.measure(list(same))
    finally:
        run.close()
    run.report("done", run.total, run.total)


class _Run:
    """A run: its processes, one for each group, and its rows so far."""

    def __init__(self, configs: Sequence[BenchConfig], journal: Journal, report: Report, limit: float):
        self.journal, self.report, self.until = journal, report, time.monotonic() + limit
        self.device, self.threads = configs[0].device, configs[0].threads
        self.environment = environment(self.device, self.threads)
        self.done, self.total = 0, sum(len(config.names) for config in configs)
        used = {CONTESTANTS[name].group for config in configs for name in config.names}
        self.groups = [group for group in GROUPS if group in used]
        self.remotes: dict[str, Remote] = {}
        self.loaded: dict[str, Facts] = {}

    def measure(self, configs: list[BenchConfig]) -> list[list[Row]]:
        """The rows of configs with the same inputs."""
        rows: list[dict[str, Row]] = [{} for _ in configs]
        for group in self.groups:
            for config, found in zip(configs, rows, strict=True):
                for name in config.names:
                    if CONTESTANTS[name].group == group:
                        row = self.row(name, config, found.get(BASE))
                        found.update({} if row is None else {name: row})
            self.unload(group)
        return [
            [found[name] for name in config.names if name in found] for config, found in zip(configs, rows, strict=True)
        ]

    def row(self, name: str, config: BenchConfig, dense: Row | None) -> Row | None:
        """The row of a contestant from the journal, or a new one; None if there is no time left."""
        self.report(f"{name}, {config.shape}", self.done, self.total)
        self.done += 1
        group, contestant = CONTESTANTS[name].group, for_objective(CONTESTANTS[name], config.objective)
        late = time.monotonic() > self.until
        facts = shaped_facts(config) or (None if late else self.load(group, config))
        if facts is None:
            return None
        errors = None if dense is None else _errors(dense)
        bounds = tolerance(facts.dtype, errors)
        planned = to_row(name, contestant, Measured(), bounds, facts, config, self.environment)
        kept = self.journal.find(planned)
        if kept is not None and kept.status != ABSENT:
            return kept
        reason = contestant.available(self.device)
        if late and not reason:
            return None
        found = Measured(status=ABSENT, note=reason) if reason else self.measured(name, config, errors)
        if found.times and name == BASE:
            found.ratios[BASE] = [1.0]
        elif found.times and dense is not None and dense.time_ms:
            found.ratios[BASE] = [1e3 * seconds / dense.time_ms for seconds in found.times]
        row = to_row(name, contestant, found, bounds, facts, config, self.environment)
        self.journal.append(row)
        return row

    def measured(self, name: str, config: BenchConfig, errors: Errors | None) -> Measured:
        """The measurements of a contestant by its group's process, or the reason why there are none."""
        group, contestant = CONTESTANTS[name].group, for_objective(CONTESTANTS[name], config.objective)
        try:
            self.load(group, config)
            request = (name, contestant, config.objective, errors)
            found: Measured = self.remotes[group].ask("measure", *request, seconds=config.patience)
        except Failed as error:
            self.recover(group)
            return Measured(status=FAILED, note=str(error))
        return found

    def load(self, group: str, config: BenchConfig) -> Facts:
        """The facts of the inputs that the group's process has drawn, which is started if it has to be."""
        if not self.remotes:  # all at once: most of a start is imports
            self.remotes = {name: self.started(name) for name in self.groups}
        if group not in self.remotes:
            self.remotes[group] = self.started(group)
        if group not in self.loaded:
            self.loaded[group] = self.remotes[group].ask("load", config, seconds=LOAD_SECONDS)
        return self.loaded[group]

    def started(self, group: str) -> Remote:
        """A new process."""
        return Remote(Worker(f"bench {group}", serve_shared, self.threads))

    def recover(self, group: str) -> None:
        """After an error, free what a contestant has left; a process that cannot is ended, and the next one started."""
        try:
            self.remotes[group].ask("release", seconds=LOAD_SECONDS)
        except Failed:
            self.end(group)

    def unload(self, group: str) -> None:
        """Free the inputs of a group: on the device there is room for those of one."""
        if self.loaded.pop(group, None) is not None:
            try:
                self.remotes[group].ask("unload", seconds=LOAD_SECONDS)
            except Failed:
                self.end(group)

    def end(self, group: str) -> None:
        """End a group's process."""
        self.loaded.pop(group, None)
        self.remotes.pop(group).close()

    def close(self) -> None:
        """End all processes."""
        for group in list(self.remotes):
            self.end(group)


def _errors(dense: Row) -> Errors | None:
    """The errors of dense from its row; None if it did not run."""
    errors = dict(zip(GRADIENTS, (dense.hidden_error, dense.weight_error), strict=True))
    return {name: error for name, error in errors.items() if error is not None} or None

"""Trials one after another in this process, or side by side in several.

A process is started once and trains trial after trial. One that dies (killed for memory, say) costs the trial that it
was at, and another is started. With GPUs, process k sees only device k modulo their number; that has not been tried on
a machine with several GPUs.
"""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ..system.processes import Ended, Worker
from .training import Outcome, run_trial
from .trial import Trial


@dataclass(frozen=True)
class Job:
    """A trial to run.

    Args:
        number: Its place in the search.
        params: Name -> value of the candidate.
        settings: Field of the training arguments -> value.
        folder: Where checkpoints go.
        seeds: How many seeds it is trained with.
    """

    number: int
    params: Mapping[str, Any]
    settings: Mapping[str, Any]
    folder: Path
    seeds: int

    def run(self, source: Any) -> Outcome:
        """Train a trainer, or what a factory makes."""
        return run_trial(source, Trial(self.number, self.params), self.settings, self.folder, self.seeds)


class Here:
    """Runs jobs in this process.

    Args:
        source: A trainer or a factory.
    """

    def __init__(self, source: Any) -> None:
        self.source = source

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Jobs with their outcomes, in order."""
        for job in jobs:
            yield job, job.run(self.source)

    def close(self) -> None:
        """There is nothing to close."""


class Processes:
    """Runs jobs in several processes.

    Args:
        source: A factory that can be pickled.
        count: How many processes.
    """

    def __init__(self, source: Any, count: int) -> None:
        self.source, self.count = source, count
        self.workers: dict[int, Worker] = {}

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Jobs with their outcomes, as they finish."""
        waiting, busy = deque(jobs), dict[int, Job]()
        while waiting or busy:
            for place in range(self.count):
                if waiting and place not in busy:
                    busy[place] = waiting.popleft()
                    self._start(place, busy[place])
            pipes = {self.workers[place].pipe: place for place in busy}
            for pipe in wait(list(pipes)):
                place = pipes[pipe]  # type: ignore[index]
                yield busy.pop(place), self._outcome(place)

    def _start(self, place: int, job: Job) -> None:
        for _ in range(2):  # the second time if the process has died since its last answer
            if place not in self.workers:
                self.workers[place] = Worker(f"process {place}", serve, self.source, place, self.count)
            try:
                return self.workers[place].send(job)
            except Ended:
                self.workers.pop(place).close(0)
        raise RuntimeError(f"process {place} ends before it trains: see what it wrote")

    def _outcome(self, place: int) -> Outcome:
        try:
            outcome: Outcome = self.workers[place].receive()
            return outcome
        except Ended as error:
            self.workers.pop(place).close(0)
            return Outcome(error=f"{error} (exit code {error.exitcode})")

    def close(self) -> None:
        """Ends the processes, also in the middle of a trial."""
        for worker in self.workers.values():
            worker.close(1)
        self.workers = {}


def serve(pipe: Any, source: Any, place: int, count: int) -> None:
    """What a process does: train what comes through the pipe, until it is closed."""
    import torch

    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if devices == [""]:
        devices = [str(k) for k in range(torch.cuda.device_count())]
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // count)))
    while True:
        try:
            job: Job = pipe.recv()
        except EOFError:
            return
        pipe.send(job.run(source))


@contextmanager
def runner(source: Any, processes: int) -> Iterator[Here | Processes]:
    """What runs jobs, until the context ends.

    Raises:
        ValueError: If several processes are asked for, but `source` cannot be sent to them.
    """
    if processes == 1:
        run: Here | Processes = Here(source)
    else:
        if hasattr(source, "train"):
            raise ValueError(
                f"processes is {processes}, but a trainer cannot be sent to them: pass a function that makes it, or"
                " processes=1"
            )
        try:
            pickle.dumps(source)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"processes is {processes}, but make_trainer cannot be sent to them ({error}): define it at the top"
                " level of a module"
            ) from None
        run = Processes(source, processes)
    try:
        yield run
    finally:
        run.close()

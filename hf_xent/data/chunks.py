"""A number for every text, computed chunk by chunk: in several processes, and resumed where a run stopped.

    each = Chunks(texts, jobs=4, draft=Path(".scores.partial"))
    values = each(function, "what the function depends on")          # [N], the same for any number of jobs

Chunks are computed by text alone and are put together in the order of the texts, so that neither the number of
processes nor an interruption changes a value.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ..system.drafts import Draft

SIZE = 64
"""Texts between two writes to the draft; an interrupted run loses the chunks that are in the processes."""
AHEAD = 2
"""Chunks that wait for each process, so that none is idle while the parent writes."""

Report = Callable[[int, int], None]
"""`report(done, total)` in texts, after each chunk."""


@dataclass(frozen=True)
class Chunks:
    """Callable: applies a function to every text.

    Args:
        texts: The texts, N of them.
        jobs: The number of processes; 1 for this process alone.
        draft: The file that keeps finished chunks; None keeps none.
        report: Is told of the progress.
    """

    texts: Sequence[str]
    jobs: int = 1
    draft: Path | None = None
    report: Report | None = None

    def __call__(self, function: Callable[[str], float], identity: str) -> np.ndarray:
        """The function's value for every text.

        Args:
            function: From a text to a number; with several jobs it is pickled.
            identity: What the function depends on. Chunks of another identity, or of other texts, are not resumed.

        Returns:
            Float64 [N].
        """
        if self.draft is None:
            chunks = list(self._reported(function, 0))
        else:
            draft = Draft(self.draft, json.dumps([identity, digest(self.texts), SIZE]))
            with draft.appending() as append:
                for chunk in self._reported(function, len(draft.chunks)):
                    append(chunk)
            chunks = draft.chunks
        return np.array([value for chunk in chunks for value in chunk], dtype=np.float64)

    def _reported(self, function: Callable[[str], float], done: int) -> Iterator[list[float]]:
        """The chunks after the first `done` ones, with the number of texts that are finished then."""
        total = len(self.texts)
        starts = range(done * SIZE, total, SIZE)
        parts = (list(self.texts[start : start + SIZE]) for start in starts)
        for start, chunk in zip(starts, _computed(function, parts, min(self.jobs, len(starts))), strict=True):
            if self.report is not None:
                self.report(start + len(chunk), total)
            yield chunk


def digest(texts: Iterable[Any]) -> str:
    """A hash of texts, which does not depend on their file."""
    found = hashlib.sha256()
    for text in texts:
        found.update(json.dumps(text).encode())
    return found.hexdigest()


def _computed(function: Callable[[str], float], parts: Iterator[list[str]], jobs: int) -> Iterator[list[float]]:
    if jobs <= 1:
        yield from ([float(function(text)) for text in part] for part in parts)
        return
    # spawned, not forked: a process inherits no threads; the function is sent once, not with every chunk
    executor = ProcessPoolExecutor(jobs, get_context("spawn"), _keep, (function,))
    waiting: deque[Future[list[float]]] = deque()
    try:
        for part in parts:
            waiting.append(executor.submit(_apply, part))
            if len(waiting) > AHEAD * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


_KEPT: list[Callable[[str], float]] = []
"""In a process of the pool: the function that it applies."""


def _keep(function: Callable[[str], float]) -> None:
    _KEPT[:] = [function]


def _apply(part: list[str]) -> list[float]:
    return [float(_KEPT[0](text)) for text in part]

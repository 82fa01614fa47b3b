"""Choose from a pool the texts that fit a target best: by compression, n-grams or losses, and by two controls.

    chosen = select(pool, target, k=1000)                            # ZIP-FIT's alignment, without its bias to length
    chosen = select(pool, target, k=1000, by="ngrams")               # importance weights, as DSIR's
    chosen = select(pool, target, k=1000, by="loss", losses=(tuned, base))
    control = select(pool, target, k=1000, by="length")              # a gain that this has too is one of length
    rows = dataset.select(chosen.indices)

The same call gives the same texts, whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..options.ranges import check_count
from .chunks import Chunks, Report
from .selectors import get
from .selectors.base import Selector


class Selection(NamedTuple):
    """The texts that were chosen, and the scores of all."""

    indices: np.ndarray
    """The chosen texts' places in the pool, the best first; int64 [k]."""
    scores: np.ndarray
    """The score of every text of the pool, higher is better; float64 [N]."""


def select(
    texts: Sequence[str],
    target: Sequence[str] | None,
    k: int,
    by: str | Selector = "compression",
    *,
    jobs: int = 1,
    draft: str | Path | None = None,
    report: Report | None = None,
    **options: Any,
) -> Selection:
    """The k texts of a pool with the highest scores.

    Args:
        texts: The pool, N texts.
        target: Texts of the target, M of them. Selectors that do not read them ('random', 'length', 'loss') take None.
        k: How many texts to choose, from 1 to N.
        by: A name of `hf_xent.data.selectors.SELECTORS`, with options if any, or a `Selector`.
        jobs: In how many processes texts are scored; it changes no score.
        draft: A file that keeps scored chunks, so that the same call resumes after an interruption; it is not deleted.
        report: Called as `report(done, total)` in texts.
        **options: Further options of the selector, such as level=1 of 'compression'.

    Returns:
        The chosen texts, and all scores. Of equal scores the earlier text is chosen; texts without a score come last.

    Raises:
        ValueError: k is below 1 or above N, a text is not a string, the target is missing or empty, or the selector is
            unknown or does not accept an option.
    """
    selector = get(by, **options)
    pool = _strings("texts", texts)
    wanted = [] if target is None else _strings("target", target)
    if not wanted and (target is not None or selector.reads_target):
        raise ValueError(f"target is {target!r}: pass at least one text of the target")
    if selector.reads_target and not any(text.strip() for text in wanted):
        raise ValueError(f"target has only empty texts, {len(wanted)} of them: pass at least one with words")
    check_k(k, len(pool))
    check_count("jobs", jobs, 1)
    each = Chunks(pool, jobs, None if draft is None else Path(draft), report)
    scores = np.asarray(selector.scores(pool, wanted, each), dtype=np.float64)
    return Selection(np.argsort(-scores, kind="stable")[:k], scores)  # NaN sorts last


def check_k(k: int, texts: int) -> None:
    """Refuse a number of texts that cannot be chosen. Raises: ValueError for k below 1 or above the number of texts."""
    check_count("k", k, 1)
    if k > texts:
        raise ValueError(f"k is {k}, but there are {texts} texts: choose at most that many")


def _strings(name: str, texts: Sequence[Any]) -> list[str]:
    """The texts as a list. Raises: ValueError for one string, or something else than strings."""
    if isinstance(texts, str):
        raise ValueError(f"{name} is the string {texts[:20]!r}...: pass a list of texts")
    found = list(texts)
    if wrong := [(i, text) for i, text in enumerate(found) if not isinstance(text, str)]:
        index, text = wrong[0]
        raise ValueError(f"{name} has {text!r} at {index}, which is {type(text).__name__}, not text: pass strings")
    return found

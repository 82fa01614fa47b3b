"""Importance weights of hashed n-grams: how much likelier a text's words are in the target than in the pool.

    log w(x) = sum_j c_j(x) log (p_j / q_j)          c_j counts of the n-grams of x in bucket j

    p_j, q_j = (counts of bucket j + s) / (all counts + s buckets)          of the target's and of the pool's texts

N-grams of 1 to n words or runs of punctuation, in lower case, are hashed by CRC-32. DSIR hashes by SHA-256, adds 1e-8
to the shares in place of s to the counts (its targets are large), and draws texts by their weights: give a seed.

Source: Xie et al. 2023, Data Selection for Language Models via Importance Resampling (DSIR), arXiv:2302.03169.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar
from zlib import crc32

import numpy as np

from ...options.ranges import check_count, check_fields
from ..chunks import digest
from .base import Each, Selector, encoded

WORD = re.compile(r"\w+|[^\w\s]+")


@dataclass(frozen=True)
class NGrams(Selector):
    """The texts with the largest importance weights."""

    n: int = 2
    """The longest n-gram, in words."""
    buckets: int = 10_000
    """How many buckets n-grams are hashed to."""
    smoothing: float = 1.0
    """What is added to the count of every bucket."""
    mean: bool = False
    """Whether the mean over the n-grams of a text takes the place of the sum, which favours short texts."""
    seed: int | None = None
    """Draws texts without replacement, by their weights; None takes the largest weights."""

    reads_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self, {"smoothing": "(0, inf)"})
        check_count("n", self.n, 1)
        check_count("buckets", self.buckets, 2)
        if self.seed is not None:
            check_count("seed", self.seed, 0)

    def scores(self, texts: Sequence[str], target: Sequence[str], each: Each) -> np.ndarray:
        """Log importance weights [N], with Gumbel noise if texts are drawn; NaN for a text without a word."""
        p, q = (self._shares(part) for part in (target, texts))
        weigh = LogWeight(np.log(p / q), self.n, self.mean)
        values = each(weigh, f"ngrams {self.n} {self.buckets} {self.smoothing} {self.mean} {digest(target)}")
        if self.seed is None:
            return values
        return values + np.random.default_rng(self.seed).gumbel(size=len(values))

    def _shares(self, texts: Iterable[str]) -> np.ndarray:
        """The smoothed share of every bucket, [buckets]."""
        counts = np.zeros(self.buckets)
        for text in texts:
            np.add.at(counts, hashed(text, self.n, self.buckets), 1)
        return (counts + self.smoothing) / (counts.sum() + self.smoothing * self.buckets)


@dataclass(frozen=True)
class LogWeight:
    """Callable: the log importance weight of a text, given log p_j / q_j [buckets]."""

    ratios: np.ndarray
    n: int
    mean: bool

    def __call__(self, text: str) -> float:
        """The sum or the mean over the text's n-grams; NaN if it has none."""
        found = self.ratios[hashed(text, self.n, len(self.ratios))]
        if not len(found):
            return float("nan")
        return float(found.mean() if self.mean else found.sum())


def hashed(text: str, n: int, buckets: int) -> np.ndarray:
    """The buckets of a text's n-grams of 1 to n words, one for each occurrence."""
    words = WORD.findall(text.lower())
    grams = (" ".join(words[i : i + size]) for size in range(1, n + 1) for i in range(len(words) - size + 1))
    return np.array([crc32(encoded(gram)) % buckets for gram in grams], dtype=np.int64)

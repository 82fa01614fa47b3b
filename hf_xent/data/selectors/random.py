"""A random order, the baseline of every selection.

    score ~ uniform(0, 1)

Relations: Every other selector has to be better than this at the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...options.ranges import check_count
from .base import Each, Selector


@dataclass(frozen=True)
class Random(Selector):
    """The same order for the same seed and number of texts."""

    seed: int = 0
    """The order's seed, 0 or more."""

    def __post_init__(self) -> None:
        check_count("seed", self.seed, 0)

    def scores(self, texts: Sequence[str], target: Sequence[str], each: Each) -> np.ndarray:
        """Uniform numbers [N]."""
        return np.random.default_rng(self.seed).random(len(texts))

"""Length alone, a control: what a score that is driven by length would select.

    score = -bytes(x)          or bytes(x), if longest

Relations: Compression at level 0 stores texts instead of compressing them and ranks like this, the shortest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...options.ranges import check_fields
from .base import Each, Selector, encoded


@dataclass(frozen=True)
class Length(Selector):
    """The shortest texts first."""

    longest: bool = False
    """Whether the longest texts come first."""

    def __post_init__(self) -> None:
        check_fields(self, {})

    def scores(self, texts: Sequence[str], target: Sequence[str], each: Each) -> np.ndarray:
        """The number of bytes, negated unless the longest come first; [N]."""
        sizes = np.array([len(encoded(text)) for text in texts], dtype=np.float64)
        return sizes if self.longest else -sizes

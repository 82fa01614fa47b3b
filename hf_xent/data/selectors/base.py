"""A selector: a frozen dataclass with its options, which gives every text a score; the highest are selected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np

Each = Callable[[Callable[[str], float], str], np.ndarray]
"""`each(function, identity)` applies a function to every text; `hf_xent.data.chunks.Chunks` describes both."""


class Selector:
    """The base of all selectors."""

    reads_target: ClassVar[bool] = False
    """Whether scores depend on the target's texts; a selector that does not read them needs none."""

    def scores(self, texts: Sequence[str], target: Sequence[str], each: Each) -> np.ndarray:
        """A score for every text.

        Args:
            texts: The texts to choose from, N of them.
            target: The texts of the target, M of them; empty if the selector does not read them.
            each: Applies a function to every text, in several processes if that was asked for; long work belongs there.

        Returns:
            Float64 [N], higher for texts that are selected earlier; NaN for those that are selected last.
        """
        raise NotImplementedError


def encoded(text: str) -> bytes:
    """The UTF-8 bytes of a text; half a surrogate pair, which some data sets have, is kept as it is."""
    return text.encode("utf-8", "surrogatepass")

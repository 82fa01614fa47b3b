"""Alignment by compression (ZIP-FIT): a text is close to the target if it helps to compress the target's texts.

    alignment(x) = 1 - mean_j NCD(x, y_j)     NCD(x, y) = (C(xy) - min(C(x), C(y))) / max(C(x), C(y))

C is the number of bytes of the DEFLATE stream of zlib, and y_j are the target's texts. Alignment depends on the length
of x as much as on its words: by default the score is what a local regression on the logarithm of the length leaves.

Level 0 stores bytes instead of compressing them, so that the score is a function of length only; it is refused. DEFLATE
refers back 32 kB at most: what is farther apart in xy is not compared, which is warned of. The cost is N M
compressions of some ten thousand a second: take tens of target texts, not thousands, and several jobs.

Source: Obbad et al. 2024, ZIP-FIT: Embedding-Free Data Selection via Compression-Based Alignment, arXiv:2410.18194.
Relations: Length is the control: a gain that Length has too is no gain of compression.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...options.ranges import check_count
from ..chunks import digest
from .base import Each, Selector, encoded
from .lengths import residual

WINDOW = 32_768
"""Bytes that DEFLATE can refer back."""


@dataclass(frozen=True)
class Compression(Selector):
    """The texts of the highest alignment with the target."""

    level: int = 6
    """The level of zlib, from 1 (fast) to 9."""
    normalise: str | None = "length"
    """'length' takes the dependence on length out of the alignment; None leaves it as published."""
    cut: int | None = None
    """How many bytes of a text are compressed, from its start; None for all. 16384 keeps every pair in the window."""

    reads_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.level == 0 and not isinstance(self.level, bool):
            raise ValueError("level is 0, at which texts are stored: length only; choose a whole number from 1 to 9")
        check_count("level", self.level, 1)
        if self.level > 9:
            raise ValueError(f"level is {self.level!r}: choose a whole number from 1 to 9")
        if self.normalise not in ("length", None):
            raise ValueError(f"normalise is {self.normalise!r}: choose 'length' or None")
        if self.cut is not None:
            check_count("cut", self.cut, 1)

    def scores(self, texts: Sequence[str], target: Sequence[str], each: Each) -> np.ndarray:
        """The alignment of every text [N], at most 1; with `normalise`, what its length does not explain.

        Raises:
            ValueError: There are too few texts for a regression on length.
        """
        sizes = np.array([len(encoded(text)[: self.cut]) for text in texts])
        if self.normalise:
            residual(np.zeros(len(sizes)), sizes)  # refuses too few texts before the long work
        targets = tuple(encoded(text)[: self.cut] for text in target)
        self._warn(sizes, max(map(len, targets)))
        identity = f"compression {self.level} {self.cut} {zlib.ZLIB_RUNTIME_VERSION} {digest(target)}"
        values = each(Alignment(targets, self.level, self.cut), identity)
        return residual(values, sizes) if self.normalise else values

    def _warn(self, sizes: np.ndarray, longest: int) -> None:
        beyond = int((sizes + longest > WINDOW).sum())
        if beyond:
            warnings.warn(
                f"{beyond} of {len(sizes)} texts and the longest target text are together longer than {WINDOW} bytes,"
                " beyond which DEFLATE does not compare: split the texts, or set cut=16384",
                stacklevel=4,
            )


class Alignment:
    """Callable: the alignment of a text with the target's texts.

    Args:
        targets: The bytes of the target's texts.
        level: The level of zlib.
        cut: How many bytes of a text are compressed; None for all.
    """

    def __init__(self, targets: tuple[bytes, ...], level: int, cut: int | None = None):
        self.targets, self.level, self.cut = targets, level, cut
        self.sizes = [len(zlib.compress(y, level)) for y in targets]

    def __call__(self, text: str) -> float:
        """One minus the mean distance."""
        x = encoded(text)[: self.cut]
        size = len(zlib.compress(x, self.level))
        pairs = zip(self.targets, self.sizes, strict=True)
        return 1 - float(np.mean([ncd(size, c, len(zlib.compress(x + y, self.level))) for y, c in pairs]))


def ncd(x: int, y: int, xy: int) -> float:
    """Normalised compression distance from the compressed sizes of two texts and of their concatenation.

        (C(xy) - min(C(x), C(y))) / max(C(x), C(y))

    Returns:
        0 for texts of which one says all that the other does, about 1 for texts that share nothing.

    Source: Li et al. 2004, The Similarity Metric, IEEE Transactions on Information Theory 50(12).
    """
    return (xy - min(x, y)) / max(x, y)

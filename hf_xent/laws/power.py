"""A power law with a floor: the loss against model size, tokens or compute, one of them alone.

    L = floor + (x0 / x)^alpha

The floor is the part that no model removes, an estimate of the entropy of the data; the rest is reducible.

Source: Henighan et al. 2020, Scaling Laws for Autoregressive Generative Modeling, arXiv:2010.14701, eq. 1.1.
Relations: ParametricLoss has two such terms, one of size and one of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import ClassVar, Self

import numpy as np

from .base import COEFFICIENT, EXPONENT, Bounds, Counts, Features, Law, Starts, coefficients


@dataclass(frozen=True)
class PowerLaw(Law):
    """`floor + (x0 / x)^alpha`, nats; the column `x` may be parameters, tokens, steps or FLOPs."""

    floor: float = nan
    """The loss in the limit, nats."""
    x0: float = nan
    """Where the reducible loss is one nat, in the unit of x."""
    alpha: float = nan
    """The exponent."""

    columns = ("x",)
    bounds: ClassVar[Bounds] = {"floor": COEFFICIENT, "x0": COEFFICIENT, "alpha": EXPONENT}
    starts: ClassVar[Starts] = {"alpha": (0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5)}
    linear = ("floor",)
    distinct: ClassVar[Counts] = {"x": 4}

    def of(self, features: Features) -> np.ndarray:
        """The formula on `x`."""
        return self.floor + np.exp(self.alpha * (np.log(self.x0) - np.log(features["x"])))

    def solved(self, parts: list[Features], y: np.ndarray) -> Self:
        """The floor and x0^alpha by least squares: the formula is linear in both."""
        x = np.concatenate([np.ravel(part["x"]) for part in parts])
        power = (x.min() / x) ** self.alpha
        floor, scale = coefficients(np.stack([np.ones_like(x), power], axis=-1), y)
        return self.having(floor=floor, x0=float(np.exp(np.log(x.min()) + np.log(scale) / self.alpha)))

    def describe(self) -> str:
        """The formula with its numbers, in one line."""
        return f"L = {self.floor:.5g} + ({self.x0:.4g} / x)^{self.alpha:.4g}"

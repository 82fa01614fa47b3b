"""The distributions that the cross-entropy method draws from and fits: a Gaussian, and frequencies of a few values.

Fitting minimises the cross-entropy between what the elites are distributed like and the family, which is maximum
likelihood; `weights` are those of importance sampling:

    Gaussian     mean = sum_i w_i x_i,    sd^2 = sum_i w_i (x_i - mean)^2        with w normalised, 1/k each by default
    frequencies  p_c  = sum_i w_i 1[x_i = c]

A family works on coordinates: numbers that a dimension of `hf_xent.cem.space` maps to values, and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
REDRAWS = 100
"""How often a draw outside of the range is repeated before it is moved to the nearer end."""


class Family(Protocol):
    """What a dimension's distribution has to do; its parameters are an array of its own shape."""

    @property
    def width(self) -> float:
        """Length of the range; inf if there is none."""

    def start(self) -> Array:
        """Parameters before anything was seen."""

    def first(self, rng: np.random.Generator, count: int) -> Array:
        """Coordinates `[count]` of the first round, and of every round of a random search."""

    def draw(self, parameters: Array, rng: np.random.Generator, count: int) -> Array:
        """Coordinates `[count]` under parameters."""

    def fit(self, coordinates: ArrayLike, weights: ArrayLike | None = None) -> Array:
        """Parameters of most likelihood."""

    def floored(self, parameters: Array, share: float) -> Array:
        """Parameters whose spread is not below a share of the range, where there is one."""

    def spread(self, parameters: Array) -> float:
        """How far the distribution is from a single value: zero if it always draws the same."""


def _normalised(count: int, weights: ArrayLike | None) -> Array:
    if weights is None:
        return np.full(count, 1 / count)
    weights = np.asarray(weights, dtype=float)
    return weights / weights.sum()


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian with parameters [mean, sd], truncated to a range (draws outside of it are repeated) or unbounded.

    Args:
        low: The lower end of the range, or -inf.
        high: The upper end, or inf.
        mean: Where it starts; the middle of the range by default.
        sd: The standard deviation it starts with; by default that of the uniform distribution, (high - low) / sqrt(12).

    Where neither is given, the first round is uniform on the range: nothing is known yet.
    """

    low: float = -inf
    high: float = inf
    mean: float | None = None
    sd: float | None = None

    @property
    def width(self) -> float:
        """Length of the range; inf if it has no end."""
        return self.high - self.low

    def start(self) -> Array:
        """The mean and standard deviation before anything was seen."""
        mean = (self.low + self.high) / 2 if self.mean is None else self.mean
        return np.array([mean, self.width / 12**0.5 if self.sd is None else self.sd])

    def first(self, rng: np.random.Generator, count: int) -> Array:
        """Draws of the first round."""
        if self.mean is None and self.sd is None:
            return rng.uniform(self.low, self.high, count)
        return self.draw(self.start(), rng, count)

    def draw(self, parameters: Array, rng: np.random.Generator, count: int) -> Array:
        """Draws of the truncated Gaussian."""
        mean, sd = parameters
        drawn = rng.normal(mean, sd, count)
        for _ in range(REDRAWS):
            outside = (drawn < self.low) | (drawn > self.high)
            if not outside.any():
                break
            drawn[outside] = rng.normal(mean, sd, int(outside.sum()))
        return np.clip(drawn, self.low, self.high)

    def fit(self, coordinates: ArrayLike, weights: ArrayLike | None = None) -> Array:
        """The weighted mean, and the standard deviation with divisor k. Truncation is not corrected for."""
        x = np.asarray(coordinates, dtype=float)
        w = _normalised(len(x), weights)
        mean = float(w @ x)
        return np.array([mean, float(w @ (x - mean) ** 2) ** 0.5])

    def floored(self, parameters: Array, share: float) -> Array:
        """The standard deviation is at least a share of the range."""
        mean, sd = parameters
        return np.array([mean, max(sd, share * self.width) if isfinite(self.width) else sd])

    def spread(self, parameters: Array) -> float:
        """The standard deviation."""
        return float(parameters[1])


@dataclass(frozen=True)
class Frequencies:
    """Probabilities of a few values, whose coordinates are 0, 1, 2 ...; two values are Bernoulli's distribution.

    Args:
        probabilities: Those it starts with.
    """

    probabilities: tuple[float, ...]

    @property
    def width(self) -> float:
        """There is no range."""
        return inf

    def start(self) -> Array:
        """The probabilities before anything was seen."""
        return np.array(self.probabilities, dtype=float)

    def first(self, rng: np.random.Generator, count: int) -> Array:
        """Draws of the first round."""
        return self.draw(self.start(), rng, count)

    def draw(self, parameters: Array, rng: np.random.Generator, count: int) -> Array:
        """Draws under probabilities."""
        return rng.choice(len(parameters), size=count, p=parameters / parameters.sum()).astype(float)

    def fit(self, coordinates: ArrayLike, weights: ArrayLike | None = None) -> Array:
        """The weighted frequencies."""
        x = np.asarray(coordinates, dtype=float).round().astype(int)
        counts = np.bincount(x, weights=_normalised(len(x), weights), minlength=len(self.probabilities))
        return counts.astype(float)

    def floored(self, parameters: Array, share: float) -> Array:
        """Unchanged: smoothing keeps every value possible."""
        return parameters

    def spread(self, parameters: Array) -> float:
        """One minus the largest probability."""
        return 1 - float(parameters.max())

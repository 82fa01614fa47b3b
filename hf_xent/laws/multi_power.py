"""The loss along a schedule, with a power law for each decay of the learning rate instead of one annealing area.

    L(s) = L0 + A S1(s)^-alpha - B sum_k (lr_(k-1) - lr_k) G(lr_k^-gamma S_k(s)),    G(x) = 1 - (C x + 1)^-beta

S1 is the sum of the learning rates to step s, S_k that from step k to s, and k runs over the steps after the warm-up.

Source: Luo et al. 2025, A Multi-Power Law for Loss Curve Prediction Across Learning Rate Schedules, arXiv:2503.12811.
Relations: AnnealingLaw has four parameters instead of seven, and a constant and a cosine curve determine it. This one
    needs a curve with a sudden decay, too, such as two stages of constant learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import nan
from typing import ClassVar

import numpy as np

from ..options.ranges import check_count
from .base import COEFFICIENT, EXPONENT, Bounds, Features, Starts
from .schedules import ScheduleLaw, after_warmup

LEAST_RATE = 1e-6  # of the peak: lr_k^-gamma exists for a decay to zero, too


@dataclass(frozen=True)
class MultiPowerLaw(ScheduleLaw):
    """`L0 + A S1^-alpha - B sum of decays`, nats, at steps of a schedule.

    Raises:
        ValueError: A field is out of its range.
    """

    L0: float = nan
    """The loss in the limit, nats."""
    A: float = nan
    """The coefficient of the sum of learning rates."""
    alpha: float = nan
    """Its exponent."""
    B: float = nan
    """The coefficient of the decays."""
    C: float = nan
    """How soon a decay has its effect."""
    beta: float = nan
    """The exponent of what is left of it."""
    gamma: float = nan
    """How much sooner at a smaller learning rate: its exponent."""
    resolution: int = field(default=32, kw_only=True)
    """How many steps are summed into one decay; 1 is the formula itself, and many times slower on long schedules."""

    bounds: ClassVar[Bounds] = {
        **dict.fromkeys(("L0", "A", "B", "C"), COEFFICIENT),
        **dict.fromkeys(("alpha", "beta", "gamma"), EXPONENT),
    }
    starts: ClassVar[Starts] = {
        "alpha": (0.3, 0.5, 0.8),
        "C": (0.3, 2.0, 10.0),
        "beta": (0.3, 0.6, 1.0),
        "gamma": (0.3, 0.6),
    }
    linear = ("L0", "A", "B")

    def __post_init__(self) -> None:
        check_count("resolution", self.resolution, 1)
        super().__post_init__()

    def of_schedule(self, lr: np.ndarray, step: np.ndarray) -> Features:
        """S1 at the steps, [rows]; size and rate of each summed decay, [K], and its S_k at the steps, [rows, K]."""
        area = np.cumsum(lr)
        first = after_warmup(lr) + 1
        drop = -np.diff(lr)[first - 1 :]  # of the steps first, first + 1, ...
        at = first + np.flatnonzero(drop)
        drop = drop[at - first]
        _, block = np.unique(at // self.resolution, return_inverse=True)
        weight = np.bincount(block, np.abs(drop))
        rate = np.bincount(block, np.abs(drop) * lr[at]) / weight
        before = np.bincount(block, np.abs(drop) * area[at - 1]) / weight
        return {
            "s1": area[step - 1],
            "drop": np.bincount(block, drop),
            "rate": np.maximum(rate, LEAST_RATE * lr.max()),
            "since": np.maximum(area[step - 1][:, None] - before, 0.0),
        }

    def of(self, features: Features) -> np.ndarray:
        """The formula on the sums of `of_schedule`."""
        scaled = self.C * features["rate"] ** -self.gamma * features["since"]
        annealed = -np.expm1(-self.beta * np.log1p(scaled)) @ features["drop"]
        return self.L0 + self.A * features["s1"] ** -self.alpha - self.B * annealed

    def describe(self) -> str:
        """The formula with its numbers, in one line."""
        return (
            f"L = {self.L0:.5g} + {self.A:.5g} S1^-{self.alpha:.4g} - {self.B:.5g} sum of decays "
            f"(C={self.C:.4g}, beta={self.beta:.4g}, gamma={self.gamma:.4g})"
        )

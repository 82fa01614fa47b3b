"""The parametric loss of Chinchilla: one power law of the model's size and one of the training tokens.

    L = E + A / N^alpha + B / D^beta        N parameters, D tokens

Source: Hoffmann et al. 2022, Training Compute-Optimal Large Language Models, arXiv:2203.15556, eq. 2.
Relations: `compute_optimal` has its best N and D in closed form. The rounded constants of the paper contradict its own
    20 tokens a parameter; Besiroglu et al. 2024, arXiv:2404.10102, fit the same points again.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import ClassVar

import numpy as np

from .base import COEFFICIENT, EXPONENT, Bounds, Counts, Features, Law, Starts


@dataclass(frozen=True)
class ParametricLoss(Law):
    """`E + A / params^alpha + B / tokens^beta`, nats per token."""

    E: float = nan
    """The loss in the limit of both, nats."""
    A: float = nan
    """The coefficient of the size."""
    alpha: float = nan
    """The exponent of the size."""
    B: float = nan
    """The coefficient of the tokens."""
    beta: float = nan
    """The exponent of the tokens."""

    columns = ("params", "tokens")
    bounds: ClassVar[Bounds] = {
        **dict.fromkeys(("E", "A", "B"), COEFFICIENT),
        **dict.fromkeys(("alpha", "beta"), EXPONENT),
    }
    starts: ClassVar[Starts] = {"alpha": (0.1, 0.2, 0.35, 0.6, 1.0), "beta": (0.1, 0.2, 0.35, 0.6, 1.0)}
    linear = ("E", "A", "B")
    distinct: ClassVar[Counts] = {"params": 3, "tokens": 3}

    def of(self, features: Features) -> np.ndarray:
        """The formula on `params` and `tokens`."""
        return self.E + self.A / features["params"] ** self.alpha + self.B / features["tokens"] ** self.beta

    def describe(self) -> str:
        """The formula with its numbers, in one line."""
        return f"L = {self.E:.5g} + {self.A:.5g} / params^{self.alpha:.4g} + {self.B:.5g} / tokens^{self.beta:.4g}"

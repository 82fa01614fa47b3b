"""The loss of a task after fine-tuning against the tokens of the pretraining.

    L = E + A / D^alpha        D tokens of pretraining

Source: Isik et al. 2024, Scaling Laws for Downstream Task Performance in Machine Translation, arXiv:2402.04177.
Relations: LogLaw is that of the task's score. Where the loss follows its law and the score does not follow LogLaw, the
    pretraining is not aligned with the task. PowerLaw is the same curve, with x0 = A^(1 / alpha).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import ClassVar

import numpy as np

from .base import COEFFICIENT, EXPONENT, Bounds, Counts, Features, Law, Starts


@dataclass(frozen=True)
class DownstreamLoss(Law):
    """`E + A / tokens^alpha`, nats per token of the task."""

    E: float = nan
    """The loss in the limit, nats."""
    A: float = nan
    """The coefficient of the tokens."""
    alpha: float = nan
    """Their exponent."""

    columns = ("tokens",)
    bounds: ClassVar[Bounds] = {"E": COEFFICIENT, "A": COEFFICIENT, "alpha": EXPONENT}
    starts: ClassVar[Starts] = {"alpha": (0.05, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5)}
    linear = ("E", "A")
    distinct: ClassVar[Counts] = {"tokens": 4}

    def of(self, features: Features) -> np.ndarray:
        """The formula on `tokens`."""
        return self.E + self.A * features["tokens"] ** -self.alpha

    def describe(self) -> str:
        """The formula with its numbers, in one line."""
        return f"L = {self.E:.5g} + {self.A:.5g} / tokens^{self.alpha:.4g}"

"""The score of a task, such as BLEU, after fine-tuning against the tokens of the pretraining.

    score = (log(A D^alpha))^beta        D tokens of pretraining, where A D^alpha > 1

Errors are differences of scores, not of logarithms as for losses.

Source: Isik et al. 2024, Scaling Laws for Downstream Task Performance in Machine Translation, arXiv:2402.04177.
Relations: DownstreamLoss is the law of the task's loss. A score that does not follow this law while the loss falls
    tells that the pretraining is not aligned with the task.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import ClassVar, Self

import numpy as np

from .base import COEFFICIENT, EXPONENT, Bounds, Counts, Features, Law, Starts


@dataclass(frozen=True)
class LogLaw(Law):
    """`(log(A tokens^alpha))^beta`, in the unit of the score."""

    A: float = nan
    """The coefficient of the tokens."""
    alpha: float = nan
    """Their exponent."""
    beta: float = nan
    """The exponent of the logarithm."""

    columns = ("tokens",)
    bounds: ClassVar[Bounds] = {"A": COEFFICIENT, "alpha": EXPONENT, "beta": EXPONENT}
    starts: ClassVar[Starts] = {"beta": (0.3, 0.6, 1.0, 1.5, 2.0, 3.0)}
    distinct: ClassVar[Counts] = {"tokens": 4}
    log_errors = False
    delta = 0.1

    def _logarithm(self, features: Features) -> np.ndarray:
        return np.log(self.A) + self.alpha * np.log(features["tokens"])

    def of(self, features: Features) -> np.ndarray:
        """The formula on `tokens`; zero where A D^alpha is below 1."""
        return np.maximum(self._logarithm(features), 0.0) ** self.beta

    def check_domain(self, features: Features) -> None:
        """Refuse tokens at which the formula has no value.

        Raises:
            ValueError: A D^alpha is at most 1.
        """
        without = np.ravel(features["tokens"])[np.ravel(self._logarithm(features) <= 0)]
        if len(without):
            raise ValueError(
                f"tokens has {without[0]:.4g}, where A tokens^alpha is at most 1 and the law has no value: leave it out"
            )

    def solved(self, parts: list[Features], y: np.ndarray) -> Self:
        """A and alpha by a straight line: score^(1 / beta) is linear in log D."""
        tokens = np.log(np.concatenate([np.ravel(part["tokens"]) for part in parts]))
        slope, intercept = np.polyfit(tokens, y ** (1 / self.beta), 1)
        return self.having(A=float(np.exp(np.clip(intercept, -200, 200))), alpha=float(np.clip(slope, 1e-3, 4.9)))

    def describe(self) -> str:
        """The formula with its numbers, in one line."""
        return f"score = (log({self.A:.5g} tokens^{self.alpha:.4g}))^{self.beta:.4g}"

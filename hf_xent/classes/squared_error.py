"""Squared error of a head of one output: the control of losses that learn numbers as classes.

    loss = (z - y)^2

Source: Legendre 1805, Nouvelles methodes pour la determination des orbites des cometes.
Relations: transformers' own loss of a classifier with num_labels=1 and labels that are floats; HLGauss and TwoHot learn
the same numbers by cross-entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from .base import ClassLoss


@dataclass(frozen=True)
class SquaredError(ClassLoss):
    """The squared difference of a number and its label; see the module's docstring."""

    labels: ClassVar[str] = "values"
    least_classes: ClassVar[int] = 1

    def outputs(self, classes: int) -> int:
        """One, whatever the classes."""
        return 1

    def __call__(self, logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        """The loss [N] of logits [N, 1] and labels [N]."""
        return (logits[:, 0] - labels.to(logits.dtype)) ** 2

    def value(self, logits: Tensor) -> Tensor:
        """The logit itself."""
        return logits[..., 0]

    def predict(self, logits: Tensor) -> Tensor:
        """The logit itself, which is the value."""
        return self.value(logits)

    def reference(self, logits: Any, labels: Any, **_: Any) -> np.ndarray:
        """The square of the difference."""
        z, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
        return np.square(y - z.reshape(len(z)))

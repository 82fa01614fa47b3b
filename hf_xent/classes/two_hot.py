"""Two-hot: regression as cross-entropy with the two bins beside the label, weighted so that their mean is the label.

    -sum_i p_i log softmax(z)_i   p_i = (c_i+1 - y) / (c_i+1 - c_i) and p_i+1 = 1 - p_i for c_i <= y < c_i+1

The centers c_i go from `low` to `high`, both included, so every label in the range is the mean of its target exactly.
The prediction is the mean of the softmax over centers.

`low` and `high` have to be set: 'two_hot:low=0, high=5'. Labels beyond are taken for the nearer end.

Source: Farebrother et al. 2024, Stop Regressing, arXiv:2403.03950, which compares it with HL-Gauss.
Relations: the projection of C51 (Bellemare et al. 2017, arXiv:1707.06887) of a single number is the same target;
HLGauss spreads it over more bins, with less weight on which bin is the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .bins import Bins


@dataclass(frozen=True)
class TwoHot(Bins):
    """Cross-entropy with the two bins beside the label; see the module's docstring."""

    @property
    def grid(self) -> tuple[float, float]:
        """The center of the first bin, and the width of a bin."""
        low, high = self.range
        return low, (high - low) / (self.bins - 1)

    def masses(self, position: Tensor, index: Tensor) -> Tensor:
        """One minus the distance, where that is not negative."""
        return (1 - (position - index).abs()).clamp(min=0)

    def reference(self, logits: Any, labels: Any, **_: Any) -> np.ndarray:
        """-p_i log q_i - p_i+1 log q_i+1, for the centers c_i and c_i+1 around the label."""
        low, high = self.range
        z, y = np.asarray(logits, np.float64), np.clip(np.asarray(labels, np.float64), low, high)
        centers, rows = np.linspace(low, high, self.bins), np.arange(len(z))
        i = np.clip(np.searchsorted(centers, y, side="right") - 1, 0, self.bins - 2)
        p = (centers[i + 1] - y) / (centers[i + 1] - centers[i])
        q = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        return -p * np.log(q[rows, i]) - (1 - p) * np.log(q[rows, i + 1])

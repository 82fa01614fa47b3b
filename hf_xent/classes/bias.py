"""Bias loss: rows whose last feature map varies much weigh more, those with little to see weigh less.

    mean_i (exp(alpha v'_i) - beta) CE_i   v' = (v - min v) / (max v - min v)

v_i is the unbiased variance over all entries of the row's last feature map, or of its last hidden states without
padding; it has no gradient. In the mode 'local' v' is between 0 and 1. In the mode 'global', the authors' default, the
minimum that is subtracted is the smallest since training began, while the denominator stays that of the batch; so v'
may exceed 1, and without bound in a batch of nearly equal variances, which is why it is cut at `largest` here. A batch
whose variances are equal (also of one row), over which the authors' code divides by zero, has v' = 0.

The minimum moves only while the state, and the model that it is kept in, is in training mode, and it is saved in
checkpoints. It is a number of the batch: the weights of a row are those of its batch, so that accumulated batches and
ranks have weights of their own. Under data parallelism buffers follow those of the first rank.

Source: Abrahamyan et al. 2021, Bias Loss for Mobile Neural Networks, arXiv:2107.11170; the official
github.com/lusinlu/biasloss_skipblocknet. Hidden states of texts and patches instead of feature maps are our reading.
Relations: focal weighs rows by their own loss; this weighs them by what the network sees in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import ClassLoss

EQUAL = 1e-6  # relative to the largest: a smaller spread of variances is that of float32's rounding


class Minimum(nn.Module):
    """The smallest variance since training began, as a buffer."""

    minimum: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("minimum", torch.tensor(torch.inf))

    @torch.no_grad()
    def forward(self, variances: Tensor) -> Tensor:
        """The smaller one of what was seen and what is given [N]; kept if in training mode."""
        smallest = torch.minimum(self.minimum.to(variances), variances.min())
        if self.training:
            self.minimum.copy_(smallest)
        return smallest


@dataclass(frozen=True)
class Bias(ClassLoss):
    """Cross-entropy weighted by the variance of each row's features; see the module's docstring."""

    alpha: float = 0.3
    """How fast the weight grows with the variance."""
    beta: float = 0.3
    """What is taken off every weight."""
    mode: str = "global"
    """'global': the minimum since training began; 'local': that of the batch."""
    largest: float = 10.0
    """The largest v'; reached in the mode 'global' alone, where the authors' code has no bound."""
    needs: ClassVar[tuple[str, ...]] = ("feature_map", "state")
    per_row: ClassVar[bool] = False
    ranges: ClassVar[dict[str, str]] = {"alpha": "[0, inf)", "beta": "[0, 1]", "largest": "[1, inf)"}

    def __post_init__(self) -> None:
        if self.mode not in ("global", "local"):
            raise ValueError(f"mode is {self.mode!r}: choose 'global' or 'local'")
        if self.mode == "local" and self.largest != type(self).largest:
            raise ValueError(f"largest is {self.largest} in the mode 'local', where v' is at most 1: leave it out")
        super().__post_init__()

    def state(self, features: int, classes: int) -> nn.Module | None:
        """The running minimum; None in the mode 'local'."""
        return Minimum() if self.mode == "global" else None

    def __call__(
        self,
        logits: Tensor,  # [N, K]
        labels: Tensor,  # [N]
        feature_map: Tensor | None = None,  # [N, L, D] or [N, C, H, W]
        state: nn.Module | None = None,  # without one, the mode 'global' starts with this batch
        mask: Tensor | None = None,  # [N, L], of a feature map [N, L, D]
        **_: Any,
    ) -> Tensor:
        """The loss, a scalar.

        Raises:
            ValueError: There is not one feature map for each row.
        """
        if feature_map is None or len(feature_map) != len(labels):
            found = None if feature_map is None else tuple(feature_map.shape)
            raise ValueError(f"feature_map is {found} for {len(labels)} labels: choose a task of one label a row")
        ce = F.cross_entropy(logits, labels, reduction="none")
        if not len(labels):
            return ce.sum()
        v = _variance(feature_map.detach().to(logits.dtype), mask)
        least = v.min() if state is None else state(v)
        spread = v.max() - v.min()
        equal = spread <= EQUAL * v.max()
        v = torch.where(equal, 0, (v - least) / torch.where(equal, 1, spread)).clamp(max=self.largest)
        return ((torch.exp(self.alpha * v) - self.beta) * ce).mean()

    def reference(
        self, logits: Any, labels: Any, feature_map: Any = None, state: Any = None, mask: Any = None, **_: Any
    ) -> np.ndarray:
        """The formula in a loop over rows, with the minimum of the state if that is smaller than the batch's."""
        z, total = np.asarray(logits, np.float64), 0.0
        maps = [np.asarray(row, np.float64) for row in feature_map]
        v = [np.var(row if mask is None else row[np.asarray(mask[i], bool)], ddof=1) for i, row in enumerate(maps)]
        least = min(v) if state is None else min(*v, float(state.minimum))
        for row, y, variance in zip(z, np.asarray(labels), v, strict=True):
            relative = (variance - least) / (max(v) - min(v)) if max(v) > min(v) else 0.0
            weight = np.exp(self.alpha * min(relative, self.largest)) - self.beta
            total += weight * (np.log(np.exp(row).sum()) - row[y])
        return np.asarray(total / len(z))


def _variance(maps: Tensor, mask: Tensor | None) -> Tensor:
    """The unbiased variance [N] of each row's entries, without those of masked positions."""
    keep = torch.ones_like(maps, dtype=torch.bool)
    if mask is not None:
        keep = keep & mask.bool().reshape(*mask.shape, *[1] * (maps.dim() - 2))
    keep, x = keep.flatten(1), maps.flatten(1)
    count = keep.sum(1, keepdim=True)
    mean = torch.where(keep, x, 0).sum(1, keepdim=True) / count.clamp(min=1)
    return torch.where(keep, (x - mean).square(), 0).sum(1) / (count[:, 0] - 1).clamp(min=1)

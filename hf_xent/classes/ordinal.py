"""Ordinal regression: classes in an order, such as stars, by K - 1 logits, each of whether the class is beyond k.

    coral: -sum_k [t_k log s(l_k) + (1 - t_k) log(1 - s(l_k))],  t_k = 1[y > k]     softmax: -log(s(l_y-1) - s(l_y))

s is the sigmoid, and classes count from 0. 'coral', ordinal cross-entropy: s(l_k) = P(y > k), where all l_k = w x + b_k
share their direction w (`ordinal_head`), and the K - 1 biases are the thresholds. 'softmax', ordinal softmax: the
likelihood of the class under the same model, with l_0 = z_0 and l_k = l_k-1 - softplus(z_k), so that thresholds are in
order for every row and no probability is negative. In closed form P(k) = s(l_k-1) s(-l_k) s(z_k), whose logarithm loses
nothing. 'corn': s(l_k) = P(y > k | y > k - 1), learned by the rows with y > k - 1 alone, so P(y > k) is a product.

With two classes all three are binary cross-entropy. 'coral' needs a head with a bias.

Source: Kennedy et al. 2020, Constructing interval variables via faceted Rasch measurement and multitask deep learning,
arXiv:2009.10277; Cao, Mirjalili and Raschka 2020, arXiv:1901.07884 (coral); Shi, Cao and Raschka 2021, arXiv:2111.08851
(corn).
Relations: cross-entropy takes every wrong class for equally wrong; SquaredError takes the classes for numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import ClassLoss
from .ordinal_head import share_direction, start_thresholds

KINDS = ("coral", "corn", "softmax")
DIVISORS = (None, "K", "pairs")


@dataclass(frozen=True)
class Ordinal(ClassLoss):
    """A loss of ordered classes; see the module's docstring."""

    kind: str = "coral"
    """'coral', 'corn' or 'softmax'."""
    normalize: str | None = None
    """What divides the sum of 'corn' over logits: None nothing, 'K' the classes, 'pairs' the (row, logit) pairs that
    are learned in the batch, which makes it a loss of the batch, as in its authors' code."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}: choose one of {', '.join(KINDS)}")
        if self.normalize not in DIVISORS:
            raise ValueError(f"normalize is {self.normalize!r}: choose 'K' or 'pairs', or leave it None")
        if self.normalize and self.kind != "corn":
            raise ValueError(f"normalize is {self.normalize!r}, but only kind='corn' is divided: leave it None")
        super().__post_init__()

    @property
    def per_row(self) -> bool:  # type: ignore[override]  # a constant in the base, here it depends on the options
        """Whether it is one number a row: all but 'corn' over pairs."""
        return self.normalize != "pairs"

    def outputs(self, classes: int) -> int:
        """K - 1."""
        return classes - 1

    def prepare(self, head: nn.Module, new: bool) -> None:
        """One direction for 'coral'; for it and 'softmax', thresholds of a new head in order.

        Raises:
            ValueError: 'coral' for a head without a bias, such as that of Llama.
        """
        bias: Any = head.bias
        if self.kind == "coral" and bias is None:
            raise ValueError(
                "kind is 'coral', whose thresholds are the biases of the head, but the head has none: choose"
                " kind='softmax' or 'corn'"
            )
        share_direction(head, self.kind == "coral")
        if new and bias is not None and self.kind != "corn":
            start_thresholds(bias, gaps=self.kind == "softmax")

    def levels(self, logits: Tensor) -> Tensor:
        """l [..., K - 1] of logits [..., K - 1]: themselves, but for 'softmax', which puts them in order."""
        if self.kind != "softmax":
            return logits
        steps = torch.cat([logits[..., :1], -F.softplus(logits[..., 1:])], -1)
        return steps.cumsum(-1)

    def __call__(self, logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        """The loss of logits [N, K - 1] and labels [N]: [N], or a scalar over pairs.

        Raises:
            ValueError: A label is no class from 0 to K - 1.
        """
        width = logits.shape[-1]
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= width:
            raise ValueError(
                f"labels go from {int(labels.min())} to {int(labels.max())} with {width + 1} classes: number the"
                f" classes from 0 to {width}, or load the model with another num_labels"
            )
        if self.kind == "softmax":
            return -self._log_probabilities(logits).gather(-1, labels[:, None])[:, 0]
        k = torch.arange(width, device=labels.device)
        beyond = labels[:, None] > k
        each = F.binary_cross_entropy_with_logits(logits, beyond.to(logits.dtype), reduction="none")
        if self.kind == "coral":
            return each.sum(-1)
        learned = labels[:, None] >= k
        each = torch.where(learned, each, 0)
        if self.normalize == "pairs":
            return each.sum() / learned.sum().clamp(min=1)
        return each.sum(-1) / (width + 1 if self.normalize == "K" else 1)

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        """log P(k) [N, K] of 'softmax': log s(l_k-1) + log s(-l_k) + log s(z_k), the parts that class k has."""
        levels = self.levels(logits)
        above, below, gap = F.logsigmoid(levels), F.logsigmoid(-levels), F.logsigmoid(logits[..., 1:])
        return F.pad(below, (0, 1)) + F.pad(above, (1, 0)) + F.pad(gap, (1, 1))

    def beyond(self, logits: Tensor) -> Tensor:
        """P(y > k) [..., K - 1]."""
        if self.kind == "corn":
            return logits.sigmoid().cumprod(-1)
        return self.levels(logits).sigmoid()

    def scores(self, logits: Tensor) -> Tensor:
        """P(k) [..., K]. A level of 'coral' that is above one before it, out of order, is taken for that one."""
        beyond = self.beyond(logits).cummin(-1).values
        return F.pad(beyond, (1, 0), value=1) - F.pad(beyond, (0, 1))

    def predict(self, logits: Tensor) -> Tensor:
        """The number of k with P(y > k) > 1/2, the median, as the authors of 'coral' and 'corn'; or the likeliest class
        of 'softmax'.
        """
        return super().predict(logits) if self.kind == "softmax" else (self.beyond(logits) > 0.5).sum(-1)

    def value(self, logits: Tensor) -> Tensor:
        """The expected class, sum_k P(y > k), from 0 to K - 1."""
        return self.beyond(logits).sum(-1)

    def reference(self, logits: Any, labels: Any, **_: Any) -> np.ndarray:
        """The formulas with probabilities: of being beyond k, of the class, or of being beyond k given beyond k - 1."""
        z, y = np.asarray(logits, np.float64), np.asarray(labels)
        rows, width = z.shape
        if self.kind == "softmax":
            levels = z[:, :1] - np.cumsum(np.log1p(np.exp(z)) * (np.arange(width) > 0), axis=1)
            ends = np.concatenate([np.ones((rows, 1)), 1 / (1 + np.exp(-levels)), np.zeros((rows, 1))], axis=1)
            return -np.log(ends[np.arange(rows), y] - ends[np.arange(rows), y + 1])
        s, loss, pairs = 1 / (1 + np.exp(-z)), np.zeros(rows), 0
        for n in range(rows):
            for k in range(width):
                if self.kind == "coral" or y[n] > k - 1:
                    loss[n] -= np.log(s[n, k]) if y[n] > k else np.log(1 - s[n, k])
                    pairs += 1
        if self.normalize == "pairs":
            return loss.sum() / pairs
        return loss / (width + 1) if self.normalize == "K" else loss

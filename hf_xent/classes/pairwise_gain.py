"""Pairwise ranking by gains: rows of larger gain score higher in their list, where large differences weigh more.

    mean over lists of (1/n) sum_(g_i > g_j) log10(1 + g_i - g_j) log(1 + exp(s_j - s_i))

The label of a row is its gain g, a number of any sign, such as a profit; rows of one `list_id` are compared, and s is
the head's one logit. A list counts its `top` rows of largest gain, n of them; rows that tie with the last one count
too, so that the loss does not depend on the order of rows. Rows of equal gain have no pair, and lists without a pair
are left out of the mean. Only differences of scores matter.

`tanh` squashes scores to (-1, 1) first, as the authors' code does; the difference of two cannot exceed 2 then, and a
pair's loss cannot fall below .127, of which the gradient keeps driving scores into saturation.

It is a number of the batch, the mean over its lists. Batches keep rows of equal `list_id` together, as far as they fit;
a list that is divided over batches or ranks is several lists, of which pairs across are not seen.

Source: Li and Ma 2025, PA-RiskRanker, in ACM Transactions on Information Systems; github.com/waylonli/PARiskRanker,
whose PA-BCE has top 6.
Relations: with equal weights it is RankNet's logistic loss; LambdaRank weighs pairs by a change of a measure instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..options.ranges import check_count
from .base import ClassLoss


@dataclass(frozen=True)
class PairwiseGain(ClassLoss):
    """The logistic loss of pairs within lists, weighted by their difference of gain; see the module's docstring."""

    top: int = 6
    """How many rows of largest gain count in a list; 0 is all."""
    tanh: bool = False
    """Whether scores are squashed to (-1, 1) in the loss, as in the authors' code."""
    labels: ClassVar[str] = "values"
    needs: ClassVar[tuple[str, ...]] = ("column:list_id",)
    per_row: ClassVar[bool] = False
    least_classes: ClassVar[int] = 1
    together: ClassVar[str] = "list_id"

    def __post_init__(self) -> None:
        check_count("top", self.top, 0)
        super().__post_init__()

    def outputs(self, classes: int) -> int:
        """One, the score."""
        return 1

    def __call__(self, logits: Tensor, labels: Tensor, list_id: Tensor | None = None, **_: Any) -> Tensor:
        """The loss, a scalar, of scores [N, 1], gains [N] and the lists' numbers [N].

        Raises:
            ValueError: The rows have no lists.
        """
        if list_id is None:
            raise ValueError("list_id is None: add the column, in which rows of one list have the same number")
        scores = logits[:, 0].tanh() if self.tanh else logits[:, 0]
        lists = list_id.flatten()
        above = labels.to(scores.dtype)[:, None] - labels.to(scores.dtype)  # [N, N], a row's gain over another's
        together = lists[:, None] == lists
        rank = (together & (above < 0)).sum(1)
        kept = rank < (self.top or len(labels))
        weight = torch.where(together & kept[:, None] & kept, above.relu().log1p() / math.log(10), 0)
        number = (together & kept).sum(1, keepdim=True).clamp(min=1)
        loss = (weight * F.softplus(scores - scores[:, None]) / number).sum()
        return loss / max(1, lists[(weight > 0).any(1)].unique().numel())

    def scores(self, logits: Tensor) -> Tensor:
        """The scores [..., 1], the logits themselves."""
        return logits

    def predict(self, logits: Tensor) -> Tensor:
        """The score [...] of each row: the larger, the higher in its list."""
        return logits[..., 0]

    def reference(self, logits: Any, labels: Any, list_id: Any = None, **_: Any) -> np.ndarray:
        """The formula in a loop over lists and pairs."""
        scores, gains = np.asarray(logits, np.float64)[:, 0], np.asarray(labels, np.float64)
        scores = np.tanh(scores) if self.tanh else scores
        lists = np.asarray(list_id).ravel()
        losses = []
        for each in np.unique(lists):
            s, g = scores[lists == each], gains[lists == each]
            last = np.sort(g)[::-1][: self.top or None][-1]
            s, g = s[g >= last], g[g >= last]
            pairs = [(i, j) for i in range(len(g)) for j in range(len(g)) if g[i] > g[j]]
            if pairs:
                losses.append(sum(np.log10(1 + g[i] - g[j]) * np.log1p(np.exp(s[j] - s[i])) for i, j in pairs) / len(g))
        return np.asarray(np.mean(losses) if losses else 0.0)

"""How the losses of many tokens become one number: their weights, and the divisor of the weighted sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Reduction:
    """A mean, a sum or no reduction; with token weights, and a number to divide by in place of their sum."""

    reduction: str = "mean"
    """'mean' divides the weighted sum by the sum of weights (0 if there is no token); 'sum'; 'none' for each token."""
    num_items: Tensor | float | None = None
    """The divisor of the sum in place of the sum of weights: the number of tokens of a whole accumulated batch."""
    token_weight: Tensor | None = None
    """Constant weights in the shape of labels; None means 1 each."""
    label_weight: Tensor | None = None
    """Factors in the shape of labels that the losses already have: they count in the sum of weights alone."""

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction is {self.reduction!r}: choose 'mean', 'sum' or 'none'")

    @property
    def unreduced(self) -> bool:
        """Whether each token keeps its loss."""
        return self.reduction == "none"

    def weights(self, labels: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
        """The factor of each token's loss before the losses are summed, in the shape of labels."""
        weight = labels.new_ones(labels.shape, dtype=dtype) if self.token_weight is None else self.token_weight
        return weight if self.unreduced else weight / self.denominator(weight, valid)

    def denominator(self, weight: Tensor, valid: Tensor) -> Tensor | float:
        """What the sum of losses with these token weights is divided by."""
        if self.num_items is not None:
            return self.num_items.to(weight.device) if isinstance(self.num_items, Tensor) else self.num_items
        if self.reduction == "sum":
            return 1.0
        counted = weight if self.label_weight is None else weight * self.label_weight
        total = torch.where(valid, counted, 0).sum()
        return torch.where(total == 0, 1.0, total)

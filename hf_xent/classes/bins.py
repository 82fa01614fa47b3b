"""The base of losses that learn a number as a distribution over bins: cross-entropy with a target for each label.

    loss = -sum_i p_i(y) log softmax(z)_i,     value = sum_i softmax(z)_i c_i     for the centers c_i of equal bins

Source: Imani and White 2018, Improving Regression Performance with Distributional Losses, arXiv:1806.04613.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..options.ranges import check_count, is_number
from .base import ClassLoss


@dataclass(frozen=True)
class Bins(ClassLoss):
    """A loss of numbers from `low` to `high`; those beyond are taken for the nearer end.

    Raises:
        ValueError: An option is out of its range; once the loss is used, also where `low` or `high` was not set.
    """

    low: float | None = None
    """The least value of the labels. It has no default: set it, and `high`."""
    high: float | None = None
    """The largest value of the labels."""
    bins: int = 51
    """The number of bins, which is the width of the head."""
    labels: ClassVar[str] = "values"
    least_classes: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_count("bins", self.bins, 2)
        for name in ("low", "high"):
            value = getattr(self, name)
            if value is not None and not is_number(value, "(-inf, inf)"):
                raise ValueError(f"{name} is {value!r}: choose a finite number")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"high is {self.high!r}: choose a number above low, which is {self.low!r}")
        super().__post_init__()

    @property
    def range(self) -> tuple[float, float]:
        """`low` and `high`. Raises: ValueError, if one was not set."""
        if self.low is None or self.high is None:
            name = "low" if self.low is None else "high"
            raise ValueError(f"{name} is None: set low and high to the least and largest value of the labels")
        return float(self.low), float(self.high)

    @property
    def grid(self) -> tuple[float, float]:
        """The center of the first bin, and the width of a bin."""
        raise NotImplementedError

    def masses(self, position: Tensor, index: Tensor) -> Tensor:
        """The probability of bin `index` for a label at `position`, both in widths of bins from the first center."""
        raise NotImplementedError

    def targets(self, labels: Tensor) -> Tensor:
        """The distributions [N, bins] that labels [N] stand for, in float32 or wider."""
        (low, high), (first, width) = self.range, self.grid
        labels = labels.to(torch.promote_types(labels.dtype, torch.float32)).clamp(low, high)
        index = torch.arange(self.bins, device=labels.device, dtype=labels.dtype)
        return self.masses(((labels - first) / width)[:, None], index)

    def outputs(self, classes: int) -> int:
        """One for each bin, whatever the classes."""
        return self.bins if self.range else 0  # refuses a loss without range before a model is resized for it

    def __call__(self, logits: Tensor, labels: Tensor, **_: Any) -> Tensor:
        """The cross-entropy [N] of logits [N, bins] with the targets of labels [N]."""
        return -(self.targets(labels).to(logits.dtype) * logits.log_softmax(-1)).sum(-1)

    def value(self, logits: Tensor) -> Tensor:
        """The mean [...] of the distribution of logits [..., bins]."""
        first, width = self.grid
        return logits.softmax(-1) @ (first + width * torch.arange(self.bins, device=logits.device, dtype=logits.dtype))

    def predict(self, logits: Tensor) -> Tensor:
        """The mean, which is the value."""
        return self.value(logits)

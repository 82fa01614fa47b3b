"""The base of losses of classes: a function of logits [N, W], labels [N] and, if it needs them, columns of the data.

A loss says what it needs and what it returns, so that one trainer can carry all of them:

    needs      'column:NAME' for each column of the data that it reads, passed as the keyword NAME, one entry a row
    per_row    whether it returns one number a row, [N], which a trainer sums over batches; else a number of the batch
    outputs    the width W of the head, for K classes
    predict    the classes that logits stand for
    reference  the paper's formula in float64, written without looking at `__call__`

Rows without a label are left out before the loss is called.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..options.ranges import check_fields

COLUMN = "column:"


@dataclass(frozen=True)
class ClassLoss:
    """A loss of classes; its options are checked when it is made."""

    needs: ClassVar[tuple[str, ...]] = ()
    """What the loss needs beside logits and labels."""
    per_row: ClassVar[bool] = True
    """Whether the loss is one number a row, not one of the batch."""
    ranges: ClassVar[dict[str, str]] = {}
    """The interval of each option that is a number; the others are True or False, or check themselves."""

    def __post_init__(self) -> None:
        check_fields(self, self.ranges)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data that the loss reads."""
        return tuple(need.removeprefix(COLUMN) for need in self.needs if need.startswith(COLUMN))

    def outputs(self, classes: int) -> int:
        """The width of the head for a number of classes."""
        return classes

    def __call__(self, logits: Tensor, labels: Tensor, **columns: Tensor) -> Tensor:
        """The loss of logits [N, W] and labels [N]: [N], or a scalar if it is not per row."""
        raise NotImplementedError

    def predict(self, logits: Tensor) -> Tensor:
        """The classes [...] that logits [..., W] stand for."""
        return logits.argmax(-1)

    def reference(self, logits: Any, labels: Any, **columns: Any) -> np.ndarray:
        """What `__call__` returns, from the paper's formula in numpy and float64."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The loss as a dictionary for JSON: its name under 'loss', which is that of its file, and its fields."""
        return {"loss": type(self).__module__.rsplit(".", 1)[-1], **asdict(self)}

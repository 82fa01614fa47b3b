"""The base of losses of classes: a function of logits [N, W], labels [N] and what else a loss says that it needs.

    labels     'classes': ids 0 to K - 1. 'values': real numbers. 'masks': images of ids [B, H, W], logits [B, W, H, W']
    needs      what `__call__` gets as keywords beside logits and labels:
                 'features'     [N, D], what the last layer saw; differentiable
                 'head'         that layer: an nn.Linear of W outputs
                 'feature_map'  [N, L, D] or [N, C, H, W], the last hidden states of each row, with a `mask` [N, L] or
                                [N, C], False for padding
                 'second'       [N, W], detached logits of a second model or pass
                 'perturbed'    [N, W], logits of the same rows at inputs that were moved within a ball; differentiable.
                                Such a loss has `gap(perturbed, logits, labels)` [N], which the search increases, and
                                the ball's `radius`, `norm`, number of `steps` and the share of the radius in a `step`
                 'state'        the module of `state`
                 'column:NAME'  a column of the data, as the keyword NAME, one entry a row
    per_row    whether it returns one number a row, [N], which a trainer sums over batches; else a number of the batch
    outputs    the width W of the head, for K classes
    scores     a number for each class, of which `predict` takes the largest, from logits
    value      the number that logits stand for, where labels are values or classes in an order
    reference  the paper's formula in float64, written without looking at `__call__`

Rows without a label (-100, or a value that is nan) are left out before the loss is called; in images they stay -100.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from ..options.ranges import check_fields

COLUMN = "column:"


@dataclass(frozen=True)
class ClassLoss:
    """A loss of classes; its options are checked when it is made."""

    labels: ClassVar[str] = "classes"
    """What labels are: 'classes', 'values' or 'masks'."""
    needs: ClassVar[tuple[str, ...]] = ()
    """What the loss needs beside logits and labels."""
    per_row: ClassVar[bool] = True
    """Whether the loss is one number a row, not one of the batch."""
    least_classes: ClassVar[int] = 2
    """The least K; 1 for a loss that takes a head of one output."""
    together: ClassVar[str] = ""
    """The column whose equal entries have to be in one batch."""
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

    def prepare(self, head: nn.Module, new: bool) -> None:
        """Changes how a head of the right width is trained and, if it is new, how it starts.

        It is called before every training, also on a head that was loaded, and has to do the same again.
        """

    def state(self, features: int, classes: int) -> nn.Module | None:
        """What the loss remembers or trains beside the model, for features of a size and K classes.

        A trainer keeps it within the model while it trains, and in its checkpoints, but not in the model's files.
        """
        return None

    def __call__(self, logits: Tensor, labels: Tensor, **given: Any) -> Tensor:
        """The loss of logits [N, W] and labels [N], with what it needs: [N], or a scalar if it is not per row."""
        raise NotImplementedError

    def penalty(self, head: nn.Module) -> Tensor | None:
        """A term of the head's weights that is added once a step, whatever the number of rows."""
        return None

    def scores(self, logits: Tensor) -> Tensor:
        """A number for each class [..., K] from logits [..., W]: probabilities, where the loss has a model of them."""
        return logits.softmax(-1)

    def predict(self, logits: Tensor) -> Tensor:
        """The classes [...] that logits [..., W] stand for; numbers, if labels are values."""
        return self.scores(logits).argmax(-1)

    def value(self, logits: Tensor) -> Tensor:
        """The numbers [...] that logits [..., W] stand for, with a gradient.

        Raises:
            ValueError: The loss is of classes without an order.
        """
        raise ValueError(
            f"loss is {self!r}, whose classes are no numbers: choose hl_gauss, two_hot, ordinal or squared_error"
        )

    def reference(self, logits: Any, labels: Any, **given: Any) -> np.ndarray:
        """What `__call__` returns, from the paper's formula in numpy and float64."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """The loss as a dictionary for JSON: its name under 'loss', which is that of its file, and its fields."""
        return {"loss": type(self).__module__.rsplit(".", 1)[-1], **asdict(self)}

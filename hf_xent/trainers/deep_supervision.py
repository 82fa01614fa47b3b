"""Losses of side outputs: a model whose outputs have `side_logits` is trained on each of them ('deep supervision').

    loss = loss(logits) + sum_k w_k loss(side_logits_k)

Each is interpolated to the labels' size as logits are, and shares the labels, the columns and the second pass; w_k is 1
by default. Counts of labels are those of the batch, so that accumulated batches are one large batch here, too.

Source: Xie & Tu 2015, Holistically-Nested Edge Detection, arXiv:1504.06375, for weighted losses of side outputs; Qin et
al. 2019, BASNet, CVPR, for their plain sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..classes.base import COLUMN, ClassLoss
from ..ops.statistics import widened
from ..options.ranges import is_number
from .class_rows import RowReader, Rows


def check_supervision(weights: Any, loss: ClassLoss) -> None:
    """Raises: ValueError for weights that are no list of numbers >= 0, or that the loss cannot use."""
    if weights is None:
        return
    if not isinstance(weights, list) or not weights or not all(is_number(w, "[0, inf)") for w in weights):
        raise ValueError(f"deep_supervision is {weights!r}: give a list of numbers >= 0, one for all or one for each")
    if any(weights):
        _check_needs(f"deep_supervision is {weights}", loss)


def supervised(
    weights: list[float] | None, outputs: Mapping[str, Any], labels: Tensor, rows: Rows, reader: RowReader
) -> Iterator[tuple[float, Rows]]:
    """The weight and the rows of each side output, of those whose weight is not 0.

    Args:
        weights: One for all, one for each, or None for 1.
        outputs: Those of the model.
        labels: Those of the batch, as the reader returns them.
        rows: The rows of `logits`.
        reader: What read them.

    Raises:
        ValueError: There are no side outputs, or another number than weights, or the loss needs what they have not.
    """
    sides = outputs.get("side_logits") or ()
    if not sides and weights is not None:
        raise ValueError(f"deep_supervision is {weights}, but {reader.kind} returns no side_logits: leave it out")
    weights = [1.0] if weights is None else weights
    if sides and len(weights) not in (1, len(sides)):
        raise ValueError(
            f"deep_supervision has {len(weights)} weights, but {reader.kind} returns {len(sides)} side_logits: give one"
            " for all, or one for each"
        )
    for weight, side in zip(weights * len(sides) if len(weights) == 1 else weights, sides, strict=True):
        if weight:
            _check_needs(f"{reader.kind} returns side_logits", reader.objective)
            of_masks = reader.objective.labels == "masks"
            aligned = {"logits": side}
            logits = widened(reader.aligned(aligned, labels)) if of_masks else reader.logits(aligned, labels)
            yield weight, replace(rows, logits=logits, given=dict(rows.given))


def _check_needs(why: str, loss: ClassLoss) -> None:
    """Raises: ValueError for a loss that reads more than logits, labels, columns and a second pass."""
    more = [need for need in loss.needs if need != "second" and not need.startswith(COLUMN)]
    if more:
        raise ValueError(
            f"{why}, but {loss!r} needs the {more[0]} of the last output: set deep_supervision to [0], or choose"
            " another loss"
        )

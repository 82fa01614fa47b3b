"""Columns of a data set that weigh its labels: `token_weights`, a list per row, and `loss_weight`, a number per row.

    loss = sum_t w_t loss_t / sum_t w_t          w_t = loss_weight of the row x token_weights[t], 1 where it is missing

over the labels of all accumulated batches of a step and of all processes. The divisor is the sum of weights, not the
number of tokens, so a weight of 0 is the label -100 (also in the statistics that are logged), and neither the scale of
the weights nor how a step is split into batches or over processes has an effect. F.cross_entropy divides by the weights
of its classes in the same way. The statistics of labels with other weights are logged unweighted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

TOKENS, ROW = "token_weights", "loss_weight"
COLUMNS = (TOKENS, ROW)
IDS = {"input_ids", "labels"}


@dataclass
class WithWeights:
    """A data collator and, if rows have one of the two columns, the weights of its batch's labels beside them.

    Padding has the weight 0. The collator itself does not see the columns.
    """

    inner: Any

    def __call__(self, rows: Sequence[Any]) -> Any:
        """The batch. Raises: ValueError for weights that do not fit, or a batch that does not have the rows' tokens."""
        if not any(isinstance(row, Mapping) and name in row for row in rows for name in COLUMNS):
            return self.inner(rows)
        weights = [row_weights(row) for row in rows]
        batch = self.inner([{name: x for name, x in row.items() if name not in COLUMNS} for row in rows])
        batch[TOKENS] = _placed(weights, rows, batch)
        return batch


def row_weights(row: Mapping[str, Any]) -> Tensor:
    """The weights of a row's labels, [T], float32. Raises: ValueError if they do not fit the labels, or are none."""
    labels = row["labels"] if row.get("labels") is not None else row["input_ids"]
    factor = checked(ROW, row.get(ROW, 1.0))
    if factor.ndim:
        raise ValueError(f"{ROW} is a list of {len(factor)}: give one number per row, or {TOKENS} with one per label")
    weights = checked(TOKENS, row.get(TOKENS, [1.0] * len(labels)))
    if weights.shape != (len(labels),):
        found = f"{len(weights)} numbers" if weights.ndim else "one number"
        raise ValueError(f"{TOKENS} has {found}, but the row has {len(labels)} labels: give one number per label")
    return weights * factor


def checked(name: str, values: Any) -> Tensor:
    """Weights as a tensor. Raises: ValueError for what is not a finite number >= 0."""
    try:
        weights = torch.as_tensor(values, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {_short(values)}: give finite numbers >= 0 in every row") from None
    wrong = weights[~((weights >= 0) & (weights < float("inf")))]  # NaN fails both
    if wrong.numel():
        raise ValueError(f"{name} has {float(wrong.flatten()[0])}: give finite numbers >= 0; 0 ignores a label")
    return weights


def _short(values: Any) -> str:
    text = repr(values)
    return text if len(text) < 40 else f"a {type(values).__name__}"


def _placed(weights: list[Tensor], rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> Tensor:
    """The weights in the shape of a batch's labels, 0 at padding."""
    labels = batch["labels"] if batch.get("labels") is not None else batch["shift_labels"]
    placed = torch.zeros(labels.shape, dtype=torch.float32)
    if len(labels) == 1 and len(rows) > 1:  # sequences that follow each other in one row, without padding between them
        flat = torch.cat(weights)
        if len(flat) <= placed.shape[1]:
            placed[0, : len(flat)] = flat
            return placed
    if len(labels) != len(rows) or any(len(w) > placed.shape[1] for w in weights):
        raise ValueError(
            f"{TOKENS} are of rows with {', '.join(str(len(w)) for w in weights)} labels, but the data collator made"
            f" labels of shape {tuple(labels.shape)}: shorten the rows before, or use one that pads them only"
        )
    for i, (own, row) in enumerate(zip(weights, rows, strict=True)):
        start = _start(row, {name: batch[name][i] for name in ("input_ids", "labels") if name in batch}, len(own))
        placed[i, start : start + len(own)] = own
    return placed


def _start(row: Mapping[str, Any], padded: Mapping[str, Tensor], length: int) -> int:
    """Where a row of that many labels begins in its padded row: at its start, or at its end on the right."""
    for name, values in padded.items():
        tokens = row.get(name)
        if tokens is None or len(tokens) != length:
            continue
        for start in (0, len(values) - length):
            if torch.equal(values[start : start + length].cpu(), torch.as_tensor(tokens)):
                return start
    raise ValueError(
        f"{TOKENS} cannot be placed, since the data collator changed the tokens of a row: use one that pads them only"
    )


def check_columns(name: str, dataset: Any) -> None:
    """Refuses a table whose weights do not fit its labels, before training. Raises: ValueError."""
    columns = [column for column in COLUMNS if column in (getattr(dataset, "column_names", None) or ())]
    if not isinstance(dataset, Dataset) or not columns or "input_ids" not in dataset.column_names:
        return  # rows of other data sets are checked batch by batch
    kept = [*columns, *(column for column in ("input_ids", "labels") if column in dataset.column_names)]
    start = 0
    for table in dataset.select_columns(kept).with_format("arrow").iter(1000):
        for i, row in enumerate(() if _fit(table) else table.to_pylist()):
            try:
                row_weights(row)
            except ValueError as error:
                raise ValueError(f"{name}, row {start + i}: {error}") from None
        start += len(table)


def _fit(table: Any) -> bool:
    """Whether all weights of an arrow table are right; False if they have to be looked at row by row."""
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    values = [columns[ROW]] if ROW in columns else []
    if TOKENS in columns:
        lengths = columns[TOKENS].value_lengths()
        if columns[TOKENS].null_count or any(columns[name].value_lengths() != lengths for name in IDS & columns.keys()):
            return False
        values.append(columns[TOKENS].flatten())
    if any(x.null_count for x in values):
        return False
    found = [torch.as_tensor(x.to_numpy().astype("float64")) for x in values]
    return all(bool(((x >= 0) & (x < float("inf"))).all()) for x in found)


def refuse_columns(name: str, dataset: Any, trainer: str) -> None:
    """Refuses a data set with weights that a trainer does not read. Raises: ValueError."""
    columns = getattr(dataset, "column_names", None) or ()
    found = next((column for column in COLUMNS if column in columns), None)
    if found is not None:
        raise ValueError(
            f"{name} has a column {found}, which has no effect in {trainer}: use XentTrainer or StreamedSFTTrainer, or"
            " remove the column"
        )

"""The data sets of DXO: labels, 0 or 1 in one column, are checked before training, and rows are numbered."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from ..ranking import DualSampler

ROW = "row_index"
"""The column of a row's number, by which the loss finds the row's moving average."""
LABELS = ("labels", "label")
"""The names that a column of labels may have: transformers' collators know these."""


def check_labels(dataset: Any, name: str) -> str:
    """The name of the column of labels. Raises: ValueError if it is not a `Dataset` with one column of 0 and 1."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}, but DXO numbers the rows and draws them by class: pass a"
            " datasets.Dataset (for rows in memory, Dataset.from_list)"
        )
    columns = [column for column in LABELS if column in dataset.column_names]
    if len(columns) != 1:
        raise ValueError(
            f"{name} has the columns {', '.join(dataset.column_names)}: exactly one of them has to be named labels (or"
            " label), with values 0 and 1; see Dataset.rename_column and remove_columns"
        )
    wrong = [value for value in dataset[columns[0]] if _scalar(value) not in (0, 1)]
    if wrong:
        raise ValueError(
            f"{name} has {wrong[0]!r} in column {columns[0]}: give 0 (negative) or 1 (positive) in every row"
        )
    return columns[0]


def labels_of(dataset: Any, name: str) -> list[int]:
    """The labels of all rows. Raises: ValueError, as `check_labels`."""
    return [_scalar(value) for value in dataset[check_labels(dataset, name)]]


def numbered(dataset: Any, name: str) -> Dataset:
    """Adds a column with the number of every row. Raises: ValueError, as `check_labels`."""
    check_labels(dataset, name)
    unnumbered = dataset.remove_columns({ROW} & {*dataset.column_names})
    return unnumbered.add_column(ROW, list(range(len(dataset))))


def without_unknown(dataset: Dataset, name: str) -> Dataset:
    """Removes columns of labels that are all -1 or None. Raises: ValueError for other labels than 0 and 1."""
    columns = {*LABELS} & {*dataset.column_names}
    unknown = [column for column in columns if all(_scalar(value) in (-1, None) for value in dataset[column])]
    dataset = dataset.remove_columns(unknown)
    if columns.difference(unknown):
        check_labels(dataset, name)
    return dataset


class SamplerEpochs(TrainerCallback):
    """Sets the sampler's epoch, which accelerate does not do where ranks resume in the middle of one."""

    sampler: DualSampler | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the epoch's batches are drawn."""
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))


def _scalar(value: Any) -> Any:
    """A label as a number, also from a list or tensor that has it as its only element."""
    value = value.tolist() if hasattr(value, "tolist") else value  # a data set with a format has arrays
    return value[0] if isinstance(value, list) and len(value) == 1 else value

"""What the data sets of a trainer have to be; refused before training, in words of the data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

IDS, TEXT = "token ids, as a tokenizer makes them", "text or messages"


def check_rows(name: str, dataset: Any, columns: Mapping[str, str]) -> None:
    """Refuse what is no data set, has no rows, or lacks a value. `columns`: what their values are, if they are there.

    Of streams and data sets of torch the rows are not looked at. Raises: ValueError.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, str | Path | Mapping) or kind == "DataFrame":
        raise ValueError(
            f"{name} is a {kind}: pass a data set of rows, such as a datasets.Dataset (of a DatasetDict one split, as"
            " dataset['train']; of a table Dataset.from_pandas or from_dict)"
        )
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"{name} has no rows: give it some, or leave it out")
    first = dataset[0] if isinstance(dataset, Dataset | list) else None
    if not isinstance(first, Mapping):
        return
    for column in (column for column in columns if column in first):
        if _may_lack(dataset, column):
            missing = [i for i, row in enumerate(dataset) if row.get(column) is None]
            if missing:
                raise ValueError(
                    f"{name} has None in column {column}, row {missing[0]}: give a value in every row, or filter the"
                    " row out"
                )
        value, what = first[column], columns[column]
        if not (isinstance(value, str | list) if what == TEXT else _is_ids(value)):
            raise ValueError(f"{name} has a {type(value).__name__} in column {column}: give {what}")


def _may_lack(dataset: Any, column: str) -> bool:
    """Whether there may be a None; without looking at the rows if a table counts them."""
    return isinstance(dataset, list) or (column in dataset.column_names and dataset.data.column(column).null_count > 0)


def _is_ids(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str) and not any(isinstance(x, str) for x in value)

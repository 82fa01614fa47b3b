"""Checks of a trainer's data sets before training; their messages name the data set, the column and the row."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

IDS, TEXT = "token ids, as a tokenizer makes them", "text or messages"


def check_rows(name: str, dataset: Any, columns: Mapping[str, str]) -> None:
    """Refuses an object that is not a data set, one without rows, and one with a row that lacks a value.

    `columns` maps a column to what its values are; those that the data set does not have are skipped, and rows of
    streams and of torch data sets are not checked. Raises: ValueError.
    """
    type_name = type(dataset).__name__
    if isinstance(dataset, str | Path | Mapping) or type_name == "DataFrame":
        raise ValueError(
            f"{name} is a {type_name}: pass a data set of rows, such as a datasets.Dataset (of a DatasetDict pass one"
            " split, as dataset['train']; of a table, Dataset.from_pandas or from_dict)"
        )
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(f"{name} has no rows: give it some, or leave it out")
    first = dataset[0] if isinstance(dataset, Dataset | list) else None
    if not isinstance(first, Mapping):
        return
    for column in (column for column in columns if column in first):
        if _may_have_none(dataset, column):
            missing = [i for i, row in enumerate(dataset) if row.get(column) is None]
            if missing:
                raise ValueError(
                    f"{name} has None in column {column}, row {missing[0]}: give a value in every row, or filter the"
                    " row out"
                )
        value, expected = first[column], columns[column]
        if not (isinstance(value, str | list) if expected == TEXT else _is_ids(value)):
            raise ValueError(f"{name} has a {type(value).__name__} in column {column}: give {expected}")


def _may_have_none(dataset: Any, column: str) -> bool:
    """Whether a column may have a None; a table counts them, so its rows are not read."""
    return isinstance(dataset, list) or (column in dataset.column_names and dataset.data.column(column).null_count > 0)


def _is_ids(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str) and not any(isinstance(x, str) for x in value)

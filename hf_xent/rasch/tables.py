"""Columns of a table of scores, whatever holds them; and a table with a column for each item as one score a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Column:
    """A column of names: what occurs in it, in the order of its first occurrence, and which one each row has."""

    names: tuple[Any, ...]
    codes: np.ndarray  # [O], places in `names`

    @classmethod
    def of(cls, values: Sequence[Any]) -> Column:
        """The column of values that can be keys of a dictionary."""
        place: dict[Any, int] = {}
        codes = np.fromiter((place.setdefault(value, len(place)) for value in values), np.int64, len(values))
        return cls(tuple(place), codes)

    def where(self, rows: np.ndarray) -> Column:
        """The column of some rows (a mask); names that none of them has are gone."""
        left = np.flatnonzero(np.bincount(self.codes[rows], minlength=len(self.names)))
        place = np.zeros(len(self.names), np.int64)
        place[left] = np.arange(len(left))
        return Column(tuple(self.names[i] for i in left), place[self.codes[rows]])

    def counts(self) -> np.ndarray:
        """The number of rows with each name."""
        return np.bincount(self.codes, minlength=len(self.names))


def values_of(frame: Any, role: str, name: str) -> list[Any]:
    """A column of a mapping of columns, a `datasets.Dataset`, a pandas DataFrame, or a list of dictionaries.

    Raises:
        ValueError: There is no such column; the message names the argument `role`.
    """
    rows = isinstance(frame, (list, tuple))
    columns = list(frame[0]) if rows and frame else list(getattr(frame, "column_names", None) or frame)
    if name not in columns:
        raise ValueError(f"{role} is {name!r}: choose a column of the frame, {', '.join(map(str, columns)) or 'none'}")
    return [row[name] for row in frame] if rows else list(frame[name])


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, nan, or the text '' or 'NA'."""
    return value is None or value != value or value in ("", "NA")


def stack(frame: Any, items: Sequence[str], *, keep: Sequence[str] = (), unit: str | None = None) -> dict[str, list]:
    """One score a row, of a table with a column for each item.

    Args:
        frame: The table, as for `fit`.
        items: The columns of the items.
        keep: Columns that stay beside every score, such as the rater.
        unit: The column of the units; None numbers the rows, each of which is a unit of its own.

    Returns:
        Columns: `unit` (or the name given), those kept, `item` and `score`, for `fit`. Missing answers stay missing.

    Raises:
        ValueError: There is no such column.
    """
    scores = [values_of(frame, "items", item) for item in items]
    count = len(scores[0]) if scores else 0
    named = {unit or "unit": list(range(count)) if unit is None else values_of(frame, "unit", unit)}
    named |= {name: values_of(frame, "keep", name) for name in keep}
    found: dict[str, list[Any]] = {name: [value for value in values for _ in items] for name, values in named.items()}
    found["item"] = [*items] * count
    found["score"] = [column[row] for row in range(count) for column in scores]
    return found

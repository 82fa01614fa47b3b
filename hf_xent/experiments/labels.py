"""Labels in a column of a data set, as the two classes that scores have to separate."""

from __future__ import annotations

from typing import Any

import numpy as np


def binary_labels(rows: Any, column: str, label: str, positive: str, least: int = 1) -> np.ndarray:
    """The labels of a data set's rows as numbers.

    Args:
        rows: The data set.
        column: The column of texts; those without words do not count towards `least`.
        label: The column of labels.
        positive: The label of the positive class; every other one is negative.
        least: How many texts of each class are needed.

    Returns:
        1 for the positive class, 0 for the other, NaN where the label is missing; float64 [N].

    Raises:
        ValueError: If there is no such column, or a class has too few texts.
    """
    if label not in rows.column_names:
        raise ValueError(f"label is {label!r}: choose one of {', '.join(rows.column_names)}")
    names = [normalized(value) for value in rows[label]]
    labels = np.array([np.nan if name is None else float(name == normalized(positive)) for name in names])
    with_text = labels[[bool(text and text.strip()) for text in rows[column]]]
    counts = [int((with_text == value).sum()) for value in (1, 0)]
    if not max(counts) or not min(counts):
        labels_in_column = ", ".join(sorted({name for name in names if name is not None})[:5]) or "no labels"
        raise ValueError(
            f"positive is {positive!r}, but column {label!r} has {labels_in_column}: both classes are"
            " needed, name the label of one with --positive"
        )
    if min(counts) < least:
        raise ValueError(
            f"label {label!r} has {counts[0]} positive and {counts[1]} negative texts: {least} of each class are needed"
        )
    return labels


def normalized(value: Any) -> str | None:
    """A label in a form that can be compared: True, 1, 1.0 and '1' are equal, as are 'Yes' and 'yes'.

    A missing label (None, NaN, an empty cell or the word nan) is None.
    """
    text = "" if value is None else str(value).strip().casefold()
    text = {"true": "1", "false": "0", "nan": ""}.get(text, text)
    try:
        number = float(text)
    except ValueError:
        return text or None
    return str(int(number)) if number.is_integer() else str(number)

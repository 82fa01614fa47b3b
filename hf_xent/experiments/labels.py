"""Labels of texts in a column of a data set, as the two classes that scores are to tell apart."""

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
    words = [normalized(value) for value in rows[label]]
    labels = np.array([np.nan if word is None else float(word == normalized(positive)) for word in words])
    with_text = labels[[bool(text and text.strip()) for text in rows[column]]]
    counts = [int((with_text == kind).sum()) for kind in (1, 0)]
    if not max(counts) or not min(counts):
        kinds = ", ".join(sorted({word for word in words if word is not None})[:5]) or "no labels"
        raise ValueError(
            f"positive is {positive!r} but column {label!r} has {kinds}: both classes are needed, and --positive names"
            " the label of one"
        )
    if min(counts) < least:
        raise ValueError(f"label {label!r} tells {counts[0]} texts from {counts[1]}: {least} of each class are needed")
    return labels


def normalized(value: Any) -> str | None:
    """A label as it is compared: True, 1, 1.0 and '1' are one, as are 'Yes' and 'yes'.

    A missing label (None, NaN, a cell that is empty or has nan) is None.
    """
    text = "" if value is None else str(value).strip().casefold()
    text = {"true": "1", "false": "0", "nan": ""}.get(text, text)
    try:
        number = float(text)
    except ValueError:
        return text or None
    return str(int(number)) if number.is_integer() else str(number)

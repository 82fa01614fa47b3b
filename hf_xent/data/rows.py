"""Rows with labels from any source, for classifiers: `load_labeled`. Their columns tell what is to be classified.

image     a column 'image' (pictures, arrays or paths), or a folder with a folder of pictures for each class
tokens    a column 'tokens', and as many 'tags' a row; in a table both are text, separated by spaces
text      a column 'text', or two columns of a pair
table     a column 'values' of lists, or every column of numbers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .files import expanded_path, first_line, inferred_type
from .text import _only, is_text, load_rows

if TYPE_CHECKING:
    from datasets import Dataset

TASKS = ("text", "tokens", "image", "table")
INPUTS = {"image": "image", "tokens": "tokens", "text": "text", "table": "values"}
"""Task -> the column that tells it, in the order in which they are looked for."""
LABELS = {
    task: ("tags", "ner_tags", "pos_tags", "labels", "label") if task == "tokens" else ("label", "labels", "target")
    for task in TASKS
}
"""Task -> the columns that labels are looked for in."""
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Columns:
    """Which columns of a source are read, and what for."""

    task: str = "auto"
    """'text', 'tokens', 'image', 'table', or 'auto' for what the columns tell."""
    inputs: tuple[str, ...] = ()
    """The columns that are classified; () for those of the task."""
    label: str | None = None
    """The column of labels; None for the first of `LABELS`."""
    more: tuple[str, ...] = ()
    """Further columns that are kept, such as those of a loss."""
    optional: bool = False
    """Whether the columns of labels and the further ones may be missing."""


class Labeled(NamedTuple):
    """Rows, and where their columns came from."""

    rows: Dataset
    """The column of `INPUTS` that belongs to the task ('text_pair' beside it for pairs), and the further columns."""
    labels: list[Any] | None
    """The label of every row as a number, a text or None for none; of tokens a list of them. None without labels."""
    names: list[str] | None
    """The names of classes in their order, where the source tells them; labels are then such names."""
    columns: Columns
    """The columns that were chosen."""
    found: tuple[str, ...]
    """All columns of the source."""


def load_labeled(source: str | Path, split: str | None = None, columns: Columns = Columns()) -> Labeled:
    """Rows to classify, from a registered data set, a file, a folder or the Hub, as `load_text` finds them.

    Args:
        source: The name, path or Hub id; also a folder of pictures, one folder a class.
        split: As for `datasets`; None for 'train', or for the only split.
        columns: What is read; of what is left open, the columns tell.

    Returns:
        The rows, with labels if there is a column of them.

    Raises:
        ValueError: The source cannot be read, or a column is missing or does not hold what the task needs.
    """
    if columns.task not in ("auto", *TASKS):
        raise ValueError(f"task is {columns.task!r}: choose auto, {', '.join(TASKS[:-1])} or {TASKS[-1]}")
    rows = _read(source, split)
    known = rows.column_names
    if columns.optional:
        label = columns.label if columns.label in known else None
        columns = replace(columns, label=label, more=tuple(name for name in columns.more if name in known))
    for name in (*columns.inputs, *([columns.label] if columns.label else []), *columns.more):
        if name not in known:
            raise ValueError(f"{source} has no column {name!r}: choose one of {', '.join(known)}")
    columns = replace(columns, task=_task(rows, columns))
    columns = replace(columns, label=columns.label or next((n for n in LABELS[columns.task] if n in known), None))
    columns = replace(columns, inputs=columns.inputs or _inputs(rows, columns, source))
    inputs = _CONVERTED[columns.task](rows, columns, source)
    labels, names = (None, None) if columns.label is None else _labels(rows, columns.label, columns.task == "tokens")
    further = {name: _values(rows[name], name, source) for name in columns.more}
    if further:
        from datasets import Dataset, concatenate_datasets

        inputs = concatenate_datasets([inputs, Dataset.from_dict(further)], axis=1)
    return Labeled(inputs, labels, names, columns, tuple(known))


def _read(source: str | Path, split: str | None) -> Dataset:
    path = expanded_path(source)
    if path.is_dir() and any(file.suffix.lower() in PICTURES for file in path.rglob("*")):
        from datasets import load_dataset

        try:
            return _only(load_dataset("imagefolder", data_dir=str(path), split=split), str(source))
        except Exception as error:  # `datasets` raises many types of them
            raise ValueError(f"cannot read the pictures in {path}: {first_line(error)}") from error
    return load_rows(source, split)


def _task(rows: Dataset, columns: Columns) -> str:
    """The task that is asked for, or the one that the columns tell."""
    if columns.task != "auto":
        return columns.task
    names = columns.inputs or rows.column_names
    found = next((task for task, name in INPUTS.items() if name in names), None)
    if found or not columns.inputs:
        return found or "table"
    feature = rows.features[columns.inputs[0]]
    if type(feature).__name__ == "Image":
        return "image"
    if is_text(feature) and not inferred_type(rows[columns.inputs[0]]):
        return "text"
    listed = getattr(feature, "feature", None)
    return "tokens" if listed is not None and is_text(listed) else "table"


def _inputs(rows: Dataset, columns: Columns, source: str | Path) -> tuple[str, ...]:
    """The columns of a task that are there."""
    name = INPUTS[columns.task]
    if name in rows.column_names:
        return (name,)
    left_out = {columns.label, *columns.more}
    numbers = tuple(n for n in rows.column_names if n not in left_out and _is_numeric(rows, n))
    if columns.task == "table" and numbers:
        return numbers
    wanted = "no column of numbers" if columns.task == "table" else f"no column {name!r}"
    raise ValueError(
        f"{source} has {wanted} to classify: name a column with --column, of {', '.join(rows.column_names)}"
    )


def _is_numeric(rows: Dataset, name: str) -> bool:
    feature = rows.features[name]
    if is_text(feature):
        return inferred_type(rows[name]) in ("int64", "float64")
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint", "float", "double"))


def _text(rows: Dataset, columns: Columns, source: str | Path) -> Dataset:
    if len(columns.inputs) > 2:
        raise ValueError(f"column is {','.join(columns.inputs)!r}: a text has one column, a pair of texts two")
    for name in columns.inputs:
        if not is_text(rows.features[name]):
            raise ValueError(f"{source} holds no text in its column {name!r}: choose another, or another task")
    names = dict(zip(columns.inputs, ("text", "text_pair"), strict=False))
    return _renamed(rows, names)


def _tokens(rows: Dataset, columns: Columns, source: str | Path) -> Dataset:
    from datasets import Dataset

    [name] = _one(columns)
    lists = [cell.split() if isinstance(cell, str) else cell for cell in rows[name]]
    if any(not isinstance(words, list) or not all(isinstance(word, str) for word in words) for words in lists):
        raise ValueError(f"{source} holds no lists of words in its column {name!r}: choose another, or another task")
    return Dataset.from_dict({"tokens": lists})


def _image(rows: Dataset, columns: Columns, source: str | Path) -> Dataset:
    from datasets import Dataset, Image

    [name] = _one(columns)
    if type(rows.features[name]).__name__ == "Image":
        return _renamed(rows, {name: "image"})
    cells = rows[name]
    if is_text(rows.features[name]):
        path = expanded_path(source)
        folder = path if path.is_dir() else path.parent
        pictures: list[Any] = [str(folder / cell) for cell in cells]
        if missing := [picture for picture in pictures if not Path(picture).is_file()]:
            raise ValueError(f"{source} names the picture {missing[0]}, which does not exist: correct the path")
    else:
        try:
            pictures = [np.asarray(cell, np.uint8) for cell in cells]
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{source} holds no pictures in its column {name!r}: choose another") from error
    return Dataset.from_dict({"image": pictures}).cast_column("image", Image())


def _table(rows: Dataset, columns: Columns, source: str | Path) -> Dataset:
    from datasets import Dataset

    if columns.inputs == ("values",) or (len(columns.inputs) == 1 and isinstance(rows[0][columns.inputs[0]], list)):
        values = [list(map(float, row)) for row in rows[columns.inputs[0]]]
        if len({len(row) for row in values}) > 1:
            raise ValueError(f"{source} has lists of several lengths in its column {columns.inputs[0]!r}: pad them")
    else:
        values = np.column_stack([_numbers(rows[name], name, source) for name in columns.inputs]).tolist()
    if not np.isfinite(np.asarray(values, np.float64)).all():
        raise ValueError(f"{source} has values that are missing or not finite: fill them in, or leave out their column")
    return Dataset.from_dict({"values": values})


_CONVERTED = {"text": _text, "tokens": _tokens, "image": _image, "table": _table}


def _one(columns: Columns) -> tuple[str, ...]:
    if len(columns.inputs) != 1:
        raise ValueError(f"column is {','.join(columns.inputs)!r}: a task of {columns.task} has one column")
    return columns.inputs


def _renamed(rows: Dataset, names: dict[str, str]) -> Dataset:
    chosen = rows.select_columns(list(names))
    return chosen.rename_columns({old: new for old, new in names.items() if old != new})


def _numbers(cells: Sequence[Any], name: str, source: str | Path) -> np.ndarray:
    try:
        return np.array([np.nan if cell in (None, "") else float(cell) for cell in cells])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source} holds no numbers in its column {name!r} ({error}): choose another") from error


def _values(cells: Sequence[Any], name: str, source: str | Path) -> list[Any]:
    """The cells of a further column as numbers or lists of them; texts, such as names of groups, become their ranks."""
    texts = [cell for cell in cells if isinstance(cell, str)]
    if not texts:
        return list(cells)
    if inferred_type(texts):
        return _numbers(cells, name, source).tolist()
    order = {text: rank for rank, text in enumerate(sorted(set(texts)))}
    return [order.get(cell, -1) for cell in cells]


def _labels(rows: Dataset, name: str, listed: bool) -> tuple[list[Any], list[str] | None]:
    """The labels of a column, and the names of their classes if its type has them."""
    feature, cells = rows.features[name], list(rows[name])
    feature = (getattr(feature, "feature", None) or feature) if listed else feature
    if names := getattr(feature, "names", None):
        named = lambda cell: None if cell is None or cell < 0 else names[cell]  # noqa: E731  used in the next line
        return [[named(c) for c in cell] if listed else named(cell) for cell in cells], list(names)
    if not listed:
        return (typed(cells) if is_text(feature) else [_missing(cell) for cell in cells]), None
    split = [cell.split() if isinstance(cell, str) else cell for cell in cells]
    return [[_missing(tag) for tag in tags] for tags in split], None


def typed(cells: Sequence[Any]) -> list[Any]:
    """Cells of text as numbers, if all of them are written as such; empty ones as None."""
    cells = [_missing(cell) for cell in cells]
    kind = {"int64": int, "float64": float}.get(inferred_type([cell for cell in cells if cell is not None]) or "")
    return [cell if cell is None or kind is None else kind(cell) for cell in cells]


def _missing(cell: Any) -> Any:
    """None for what is no label: an empty text, -100 or nan."""
    if isinstance(cell, str):
        return cell.strip() or None
    return None if cell is None or cell == -100 or cell != cell else cell

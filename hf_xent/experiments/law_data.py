"""The data of laws that read no schedule: rows of a table, or the ends of training runs from their curves."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..laws.base import Law
from ..laws.curves import Curve, read, rows_of
from .forecasting import thinned

OF_CURVES = ("params", "tokens", "step")


class Rows(NamedTuple):
    """What a law is fitted to."""

    columns: dict[str, np.ndarray]
    """The columns of the law by its own names, [rows] each."""
    y: np.ndarray
    """Losses, or the scores of a law of scores, [rows]."""


def load_rows(files: Sequence[str | PathLike[str]], law: Law, x: str | None = None, points: int = 100) -> Rows:
    """The rows of files for a law.

    Args:
        files: CSV tables with the law's columns and 'loss' (or 'score'); or curves, files with 'lr'. A curve gives
            one row, with the mean loss of its last steps; or all its mean losses, if x is 'tokens' or 'step'.
        law: A law that reads no schedule.
        x: For a law of one column `x`: the column of the files that it stands for.
        points: How many mean losses a curve has.

    Returns:
        The rows.

    Raises:
        ValueError: A column is missing or holds no numbers, tables and curves are mixed, or x is missing or has no use.
    """
    if ("x" in law.columns) != (x is not None):
        if x is None:
            raise ValueError(f"x is missing: {type(law).__name__} needs the name of a column, such as params or tokens")
        raise ValueError(f"x is {x!r}, but {type(law).__name__} reads {', '.join(law.columns)}: leave x out")
    paths = [Path(file) for file in files]
    kinds = {"lr" in _names(path) for path in paths}
    if len(kinds) != 1:
        raise ValueError("files are tables and curves (with a column lr), or none: give one kind of them")
    source = {name: x if name == "x" and x is not None else name for name in law.columns}
    if kinds == {True}:
        return _of_curves([read(path) for path in paths], source, points)
    outcome = "loss" if law.log_errors else "score"
    tables = [_table(path, [*source.values(), outcome]) for path in paths]
    joined = {name: np.concatenate([table[name] for table in tables]) for name in (*source.values(), outcome)}
    return Rows({name: joined[column] for name, column in source.items()}, joined[outcome])


def _names(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(line for line in file if not line.startswith("#")), [])


def _table(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    rows = rows_of(path)
    if missing := [name for name in names if not rows or name not in rows[0]]:
        raise ValueError(f"{path} has no column {missing[0]!r} with values: its rows need {', '.join(names)}")
    try:
        return {name: np.array([float(row[name]) for row in rows]) for name in names}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has a value that is no number: {error}") from None


def _of_curves(curves: list[Curve], source: dict[str, str], points: int) -> Rows:
    if unknown := [column for column in source.values() if column not in OF_CURVES]:
        raise ValueError(f"{unknown[0]} is not known of a curve, which has {', '.join(OF_CURVES)}: give a table")
    thin = [thinned(curve, points) for curve in curves]
    whole = list(source) == ["x"] and source["x"] != "params"
    kept = slice(None) if whole else slice(-1, None)
    found: dict[str, list[np.ndarray]] = {name: [] for name in source}
    for curve in thin:
        rows = len(curve.loss[kept])
        for name, column in source.items():
            values = curve.columns([column])[column]
            found[name].append(np.full(rows, float(values)) if column == "params" else np.asarray(values)[kept])
    columns = {name: np.concatenate(values).astype(float) for name, values in found.items()}
    return Rows(columns, np.concatenate([curve.loss[kept] for curve in thin]))

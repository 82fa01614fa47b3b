"""`Curve`, the losses of one training run with the learning rate of its every step, and how one is read from CSV.

    step,lr,loss,tokens,params
    1,1e-05,,512,1000000
    2,2e-05,10.31,1024,1000000

Only `step`, `lr` and `loss` are needed; a loss is empty where none was logged. Lines that start with # are comments.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from ..options.ranges import check_count
from .base import Law, first_bad
from .schedules import ScheduleLaw, schedule, steps_of


@dataclass(frozen=True, eq=False)
class Curve:
    """A training run: the schedule of its learning rate, and its loss at some of the steps.

    Args:
        lr: The learning rate used in every step from the first, warm-up included, [steps].
        step: The steps, from 1, whose loss is known, in order, [rows].
        loss: The losses, nats per token, [rows].
        params: The number of the model's parameters.
        tokens: Training tokens so far at each of these steps, [rows].
        name: What messages and tables call it.

    Raises:
        ValueError: Shapes do not fit, steps are not in order, or a loss is not positive and finite.
    """

    lr: np.ndarray
    step: np.ndarray
    loss: np.ndarray
    params: float | None = None
    tokens: np.ndarray | None = None
    name: str = ""

    def __post_init__(self) -> None:
        lr = schedule(self.lr)
        step, loss = steps_of(lr, self.step), losses(self.loss)
        if step.shape != loss.shape:
            raise ValueError(f"loss has the shape {loss.shape} and step {step.shape}: give one loss a step")
        if np.any(np.diff(step) <= 0):
            raise ValueError(f"step is not in order after {step[np.argmax(np.diff(step) <= 0)]}: give each step once")
        for name, value in (("lr", lr), ("step", step), ("loss", loss)):
            object.__setattr__(self, name, value)
        if self.tokens is not None:
            tokens = np.asarray(self.tokens, dtype=float)
            if tokens.shape != step.shape:
                raise ValueError(f"tokens has the shape {tokens.shape} and step {step.shape}: give one number a step")
            object.__setattr__(self, "tokens", tokens)

    def __len__(self) -> int:
        return len(self.step)

    def columns(self, names: Iterable[str]) -> dict[str, Any]:
        """The columns of a law.

        Raises:
            ValueError: The curve does not have one of them.
        """
        found = {name: getattr(self, name, None) for name in names}
        if missing := [name for name, value in found.items() if value is None]:
            raise ValueError(f"curve {self.name!r} has no {missing[0]}: set it, or give the columns of the law")
        return found

    def _chosen(self, rows: Any, **changes: Any) -> Self:
        tokens = None if self.tokens is None else self.tokens[rows]
        return replace(self, **{"step": self.step[rows], "loss": self.loss[rows], "tokens": tokens} | changes)

    def after(self, step: int) -> Self:
        """The curve without the losses up to a step; its schedule stays whole."""
        return self._chosen(self.step > step)

    def every(self, count: int) -> Self:
        """The curve with every `count`-th of its losses, the last one among them."""
        check_count("count", count, 1)
        return self._chosen(np.arange(len(self) - 1, -1, -count)[::-1])

    def averaged(self, count: int) -> Self:
        """The curve with the mean of each `count` successive losses, at the middle one of their steps.

        The loss of single batches is noise around what a law predicts. Losses left over at the start are dropped.
        """
        check_count("count", count, 1)
        kept = np.arange(len(self) % count, len(self)).reshape(-1, count)
        return self._chosen(kept[:, count // 2], loss=self.loss[kept].mean(axis=1))


def losses(values: Any) -> np.ndarray:
    """Losses or scores as an array of one dimension. Raises: ValueError, as one is not positive and finite."""
    loss = np.atleast_1d(np.asarray(values, dtype=float))
    if loss.ndim != 1 or not np.all(np.isfinite(loss) & (loss > 0)):
        bad = f"the shape {loss.shape}" if loss.ndim != 1 else f"the value {first_bad(loss)!r}"
        raise ValueError(f"loss has {bad}: give positive, finite numbers, one a row")
    return loss


def read(path: str | PathLike[str], warmup: int | None = None) -> Curve:
    """A curve from a CSV file with the columns step, lr, loss and, where known, tokens and params.

    The learning rate between the file's steps is interpolated, which is exact if it has every step.

    Args:
        path: The file.
        warmup: The steps of a linear warm-up from zero, if the file starts after it.

    Returns:
        The curve, named as the file.

    Raises:
        ValueError: A column is missing or has other text than numbers, or the file starts late without `warmup`.
    """
    path = Path(path)
    rows = rows_of(path)
    if not rows or (missing := {"step", "lr", "loss"} - set(rows[0])):
        raise ValueError(f"{path} has no {', '.join(sorted(missing)) if rows else 'rows'}: write step,lr,loss")
    try:
        table = {name: np.array([float(row[name] or "nan") for row in rows]) for name in rows[0] if name in _NUMBERS}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has a value that is no number: {error}") from None
    lr = _lr_of_every_step(path, table["step"], table["lr"], warmup)
    logged = np.isfinite(table["loss"])
    params = table["params"][logged] if "params" in table else np.array([])
    known = bool(len(params)) and bool(np.isfinite(params[-1]))
    tokens = table["tokens"][logged] if "tokens" in table and np.all(np.isfinite(table["tokens"][logged])) else None
    step, loss = table["step"][logged], table["loss"][logged]
    return Curve(lr, step, loss, params=float(params[-1]) if known else None, tokens=tokens, name=path.stem)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by column, without lines that begin with '#'."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


_NUMBERS = ("step", "lr", "loss", "tokens", "params")


def _lr_of_every_step(path: Path, step: np.ndarray, lr: np.ndarray, warmup: int | None) -> np.ndarray:
    """Interpolated between the steps of a file, and with the warm-up before them, [steps]."""
    if not np.all(np.isfinite(step) & np.isfinite(lr)) or np.any(np.diff(step) <= 0) or step[0] < 1:
        raise ValueError(f"{path} has steps that are not in order from 1, or a step without its lr")
    if step[0] > 1 and warmup is None:
        raise ValueError(f"{path} starts at step {step[0]:g}: give warmup, the steps of its linear warm-up")
    every = np.arange(1, int(step[-1]) + 1)
    full = np.interp(every, step, lr)
    if warmup:
        full[:warmup] = np.minimum(full[:warmup], lr.max() * every[:warmup] / warmup)
    return full


class Part(NamedTuple):
    """The columns of one curve, or of all rows, and their losses, if known."""

    columns: Mapping[str, Any]
    y: np.ndarray | None


Data = Curve | Sequence[Curve] | Mapping[str, Any]


def parts_of(law: Law, data: Data, y: Any = None) -> list[Part]:
    """Curves, or a mapping of columns, as the parts that a law predicts.

    Args:
        law: The law.
        data: A curve, several, or column -> values.
        y: The losses of the rows of columns; curves have theirs.

    Returns:
        One part a curve, or one for all rows.

    Raises:
        ValueError: The data are none of these, or lack a column.
    """
    if isinstance(data, Mapping):
        return [Part(data, None if y is None else losses(y))]
    curves = [data] if isinstance(data, Curve) else list(data)
    if not curves or not all(isinstance(curve, Curve) for curve in curves):
        raise ValueError(f"data is {data!r}: give a mapping of columns, a Curve, or a list of curves")
    if y is not None:
        raise ValueError("y is given beside curves, which have their own losses: leave it out")
    if not isinstance(law, ScheduleLaw) and "x" in law.columns:
        raise ValueError(f"data are curves, and {type(law).__name__} needs a column x: give {{'x': curve.step}} and y")
    return [Part(curve.columns(law.columns), curve.loss) for curve in curves]

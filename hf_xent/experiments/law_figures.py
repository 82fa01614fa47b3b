"""Figures of laws: the curves of runs with what a law predicts of them and its band, and losses against a fit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from ..laws import Curve, Fit
from ..laws.schedules import after_warmup
from ..system.figures import panels, save
from .forecasting import Outlook, thinned

COLORS = ("#33658a", "#d1495b", "#2f9e6e", "#edae49", "#7b5ea7", "#8a8f98")


def draw_curves(
    curves: Sequence[Curve],
    fit: Fit,
    path: Path,
    outlook: Outlook | None = None,
    *,
    points: int = 100,
    measured: Curve | None = None,
) -> Path:
    """Write a PNG of curves and a law of schedules (left), and of their learning rates (right); returns its path.

    Args:
        curves: The runs that the law was fitted to: their mean losses are dots, the law is a line.
        fit: The fitted law.
        path: The file to write.
        outlook: A forecast, drawn as a broken line with its band.
        points: Mean losses of a curve.
        measured: The run that was predicted, if it has been made.
    """
    figure, (left, right) = panels(2, 10, 3.8)
    for curve, color in zip(curves, cycle(COLORS), strict=False):
        seen = thinned(curve, points)
        left.plot(seen.step, seen.loss, ".", color=color, markersize=3, alpha=0.7)
        left.plot(seen.step, fit.predict(seen).loss, color=color, label=curve.name)
        right.plot(np.arange(1, len(curve.lr) + 1), curve.lr, color=color)
    if outlook is not None:
        color, name = "black", f"forecast: {outlook.schedule.name}"
        left.fill_between(outlook.step, outlook.low, outlook.high, color=color, alpha=0.15, linewidth=0)
        left.plot(outlook.step, outlook.loss, "--", color=color, label=name)
        right.plot(np.arange(1, len(outlook.lr) + 1), outlook.lr, "--", color=color)
    if measured is not None:
        seen = thinned(measured, points)
        left.plot(seen.step, seen.loss, ".", color="black", markersize=3, label=f"measured: {measured.name}")
    shown = [thinned(curve, points) for curve in curves]
    first = min(after_warmup(curve.lr) + len(curve.lr) // 10 for curve in curves)  # the first losses dwarf the others
    top = max(float(curve.loss[curve.step > first].max(initial=curve.loss.min())) for curve in shown)
    left.set(xlabel="step", ylabel="loss (nats per token)", ylim=(None, top))
    right.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    return save(figure, path)


def draw_columns(fit: Fit, columns: dict[str, Any], loss: Any, path: Path) -> Path:
    """Write a PNG of losses against a column of a law, one line for each value of its other one; returns its path.

    Args:
        fit: The fitted law, of one column or two.
        columns: Its columns, [rows] each.
        loss: The losses that were measured, [rows].
        path: The file to write.

    Raises:
        ValueError: The law has more columns.
    """
    *others, x = fit.law.columns
    if len(others) > 1:
        raise ValueError(f"law is {type(fit.law).__name__} of {', '.join(fit.law.columns)}: a figure shows two at most")
    arrays = {name: np.asarray(columns[name], dtype=float) for name in fit.law.columns}
    loss = np.asarray(loss, dtype=float)
    figure, [axis] = panels(1, 5.6, 4.0)
    groups = np.unique(arrays[others[0]]) if others else [None]
    line = np.geomspace(arrays[x].min(), arrays[x].max(), 60)
    for group, color in zip(groups, cycle(COLORS), strict=False):
        rows = np.full(len(loss), True) if group is None else arrays[others[0]] == group
        found = fit.predict({x: line} | ({} if group is None else {others[0]: np.full(60, group)}))
        axis.plot(arrays[x][rows], loss[rows], ".", color=color)
        axis.plot(line, found.loss, color=color, label=None if group is None else f"{others[0]} {group:.3g}")
        axis.fill_between(line, found.low, found.high, color=color, alpha=0.15, linewidth=0)
    axis.set(xscale="log", xlabel=x, ylabel="loss (nats per token)", title=fit.law.describe())
    axis.title.set_fontsize(8)
    if others:
        axis.legend(frameon=False, fontsize=8)
    return save(figure, path)

"""Figures as PNG files, drawn without pyplot: the user's backend, open figures and settings stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A new figure of that size in inches, and its panels side by side, each without a frame above and on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # imported here: it takes half a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory and needs no display
    axes = list(figure.subplots(1, count, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, path: Path, dpi: int = 130) -> Path:
    """Write a figure; returns its path. The format is PNG, whatever the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, format="png")
    return path

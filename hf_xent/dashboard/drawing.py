"""Charts as coordinates of an SVG: ticks, paths and points, which the template `chart.html` writes down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, floor, log10

from ..experiments.finetuning import STOCK
from .contents import Chart, Curve, is_number

WIDTH, HEIGHT, ROW = 420, 250, 24
RIGHT, TOP, BOTTOM = 12, 10, 40
COLORS = 8
"""How many colors the style sheet has."""
MOST, MARKED = 600, 120
"""The most points of a path, and the most of them that have a mark with a tooltip."""
LETTER = 6.2
"""The width of a letter of the axes, about."""


@dataclass(frozen=True)
class Drawn:
    """A chart whose coordinates are those of its SVG."""

    title: str
    x: str
    y: str
    height: int
    left: float
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    curves: list[Line]
    legend: list[tuple[str, str]]
    """(class, name) of every curve; empty if there is nothing to tell apart."""


@dataclass(frozen=True)
class Line:
    """A curve: its style class, its path, and marks (x, y, tooltip)."""

    style: str
    path: str
    marks: list[tuple[float, float, str]]


def drawn(chart: Chart, colors: Mapping[str, int]) -> Drawn | None:
    """Lays out a chart.

    Args:
        chart: The chart.
        colors: Name of a curve -> its number, the same in all charts that it is in.

    Returns:
        The layout; None if no point is finite.
    """
    points = [(x, y) for curve in chart.curves for x, y in zip(curve.x, curve.y, strict=True) if is_number(y)]
    if not points:
        return None
    xs, ys = [x for x, _ in points], [float(y) for _, y in points if y is not None]
    whole = all(isinstance(x, int) for x in xs)
    x_ticks = _decades(min(xs), max(xs)) if chart.log_x else _ticks(min(xs), max(xs), whole=whole)
    if chart.rows:
        height = TOP + BOTTOM + ROW * len(chart.rows)
        low, high, y_ticks = len(chart.rows) - 0.5, -0.5, [(float(i), name) for i, name in enumerate(chart.rows)]
    else:
        height = HEIGHT
        y_ticks = _ticks(0.0, 1.0) if chart.unit else _ticks(min(ys), max(ys))
        low, high = min(min(ys), y_ticks[0][0]), max(max(ys), y_ticks[-1][0])
    y_ticks = [(value, _clipped(label, 24)) for value, label in y_ticks]
    left = (24 if chart.y else 10) + LETTER * max(len(label) for _, label in y_ticks)
    inside = 0 if all(curve.joined for curve in chart.curves) else 6  # marks do not lie on the axis
    place_x = _scale(min(xs), max(xs), left + inside, WIDTH - RIGHT - inside, log=chart.log_x)
    place_y = _scale(low, high, height - BOTTOM, TOP)
    lines = [_line(curve, chart, (place_x, place_y), f"c{colors[curve.name] % COLORS}") for curve in chart.curves]
    names = [
        " ".join(filter(None, (c.name, f"({c.note})" if c.note and c.note != "diagonal" else ""))) for c in chart.curves
    ]
    return Drawn(
        title=chart.title,
        x=chart.x,
        y=chart.y,
        height=height,
        left=left,
        x_ticks=[(place_x(value), label) for value, label in x_ticks if min(xs) <= value <= max(xs)],
        y_ticks=[(place_y(value), label) for value, label in y_ticks],
        curves=lines,
        legend=[(line.style, name) for line, name in zip(lines, names, strict=True)] if len(lines) > 1 else [],
    )


def _line(curve: Curve, chart: Chart, places: tuple[Callable[[float], float], ...], color: str) -> Line:
    """The path of a curve, broken where it has no value, and its marks."""
    place_x, place_y = places
    points = _thinned([*zip(curve.x, curve.y, strict=True)], MOST)
    path, broken = [], True
    for x, y in points if curve.joined else ():
        if y is None or not is_number(y):
            broken = True
            continue
        path.append(f"{'M' if broken else 'L'}{place_x(x):.1f},{place_y(y):.1f}")
        broken = False
    every = max(1, ceil(len(points) / MARKED))
    marks = []
    for x, y in points[::every] if curve.joined else points:
        if y is not None and is_number(y):
            value = chart.rows[int(y)] if chart.rows else f"{y:.5g}"
            marks.append((round(place_x(x), 1), round(place_y(y), 1), f"{curve.label}: {value} at {chart.x} {x:.5g}"))
    kind = "" if curve.joined else " points"
    color = "diagonal" if curve.is_diagonal else "stock" if curve.name == STOCK else color
    style = f"{color} noted" if curve.note else color
    return Line(style + kind, " ".join(path), [] if curve.is_diagonal else marks)


def _thinned(points: list[tuple[float, float | None]], most: int) -> list[tuple[float, float | None]]:
    """The first, lowest, highest and last point of each of some equal parts, so that no spike is lost."""
    if len(points) <= most:
        return points
    size, kept = ceil(len(points) / (most // 4)), []
    for start in range(0, len(points), size):
        part = range(start, min(start + size, len(points)))
        valued = [i for i in part if is_number(points[i][1])]
        ends = [min(valued, key=lambda i: points[i][1]), max(valued, key=lambda i: points[i][1])] if valued else []  # type: ignore[arg-type,return-value]
        kept += sorted({part[0], part[-1], *ends})
    return [points[i] for i in kept]


def _scale(low: float, high: float, start: float, end: float, *, log: bool = False) -> Callable[[float], float]:
    """The place of a value between two coordinates."""
    of = log10 if log else float
    first, width = of(low), (of(high) - of(low)) or 1.0
    shift = 0.5 if high == low else 0.0  # a single value stands in the middle
    return lambda value: start + (end - start) * ((of(value) - first) / width + shift)


def _ticks(low: float, high: float, *, whole: bool = False) -> list[tuple[float, str]]:
    """Round values that cover an interval, with labels that tell them apart."""
    from matplotlib.ticker import MaxNLocator  # lazy: it takes a third of a second

    if low == high:
        return [(low, f"{low:.6g}")]
    values = [float(v) for v in MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)]
    digits = next((d for d in range(4, 16) if len({f"{v:.{d}g}" for v in values}) == len(values)), 16)
    return [(value, f"{value:.{digits}g}") for value in values]


def _decades(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten between two numbers; 2 and 5 times them too if there are few."""
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    values = [10.0**p for p in powers]
    if high / low < 100:
        values = [f * v for v in values for f in (1, 2, 5)]
    return [(value, f"{value:g}") for value in values]


def _clipped(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"

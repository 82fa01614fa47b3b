"""Plots of time and memory against the number of tokens and against the vocabulary, as PNG."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..system.figures import panels, save
from .contestants import CONTESTANTS
from .objectives import PLAIN
from .rows import OK, Row

AXES = {"N": ("tokens", "tokens N"), "V": ("vocabulary", "vocabulary V")}  # field of Row -> file name, label
PANELS = {"time_ms": ("time", "ms"), "peak_mib": ("peak memory beyond inputs and gradients", "MiB")}
OURS = ("#d1495b", "#f08a4b", "#7b2d43", "#e5a4b4")
OTHERS = ("#30343b", "#8a8f98", "#b9bdc4", "#1f77b4", "#6baed6", "#2ca02c", "#9467bd", "#8c6d31", "#17becf")


def draw(rows: Iterable[Row], target: Path) -> list[Path]:
    """For each dtype, `<target>-<dtype>-tokens.png` and `-vocabulary.png` where these vary; returns their paths."""
    fine = [row for row in rows if row.status == OK and row.objective == PLAIN]
    paths = []
    for dtype in sorted({row.dtype for row in fine}):
        for axis, (name, _) in AXES.items():
            series = longest([row for row in fine if row.dtype == dtype], axis)
            if series:
                paths.append(_figure(series, axis, target.with_name(f"{target.name}-{dtype}-{name}.png")))
    return paths


def longest(rows: Iterable[Row], axis: str) -> list[Row]:
    """The rows that differ only in `axis` and have the most values there; empty if there are fewer than two values.

    Among equally long series, real inputs are preferred to generated ones, then the largest shape.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        shape = (row.V if axis == "N" else row.N, row.D, row.threads)
        groups.setdefault((row.real, shape, row.source), []).append(row)
    counts = {key: len({getattr(row, axis) for row in series}) for key, series in groups.items()}
    best = max(counts, key=lambda key: (counts[key], *key), default=None)
    return [] if best is None or counts[best] < 2 else sorted(groups[best], key=lambda row: getattr(row, axis))


def _figure(series: list[Row], axis: str, path: Path) -> Path:
    figure, axes = panels(2, 11, 4.2)
    for panel, (field, (title, unit)) in zip(axes, PANELS.items(), strict=True):
        _panel(panel, series, axis, field)
        panel.set(xlabel=AXES[axis][1], ylabel=unit, title=title)
    # the left panel shows all contestants: the floor has a time, but no memory
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    row = series[0]
    fixed = f"V={row.V}" if axis == "N" else f"N={row.N}"
    figure.suptitle(f"{row.device}, {row.threads} threads; {row.source}: {fixed}, D={row.D}, {row.dtype}", fontsize=10)
    return save(figure, path)


def _panel(panel: Any, series: list[Row], axis: str, field: str) -> None:
    """Draw a line for each contestant on logarithmic axes, above a guide of slope 1."""
    values = sorted({getattr(row, axis) for row in series})
    lowest = []
    for name in dict.fromkeys(row.contestant for row in series):
        points = [(getattr(row, axis), getattr(row, field)) for row in series if row.contestant == name]
        points = [(x, y) for x, y in points if y]  # logarithmic axes cannot show 0
        if points:
            panel.plot(*zip(*points, strict=True), label=name, markersize=4, **_style(name))
            lowest.append(min(y * values[0] / x for x, y in points))
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(values, [str(value) for value in values], rotation=30)
    panel.yaxis.get_major_locator().set_params(subs=(1, 3))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    if lowest:
        guide = [0.7 * min(lowest) * value / values[0] for value in values]
        panel.plot(values, guide, color="#9aa0a6", ls="--", lw=1, zorder=0, label="linear")
    panel.grid(axis="y", alpha=0.25)


def _style(name: str) -> dict[str, Any]:
    """The style of a contestant, the same in every figure; ours have warm colors and thick lines."""
    ours = name.startswith("hf_xent")
    family = [other for other in CONTESTANTS if other.startswith("hf_xent") == ours]
    index = family.index(name) if name in family else len(family)
    colors = OURS if ours else OTHERS
    return {"color": colors[index % len(colors)], "lw": 2.2 if ours else 1.3, "marker": "o" if ours else "s"}

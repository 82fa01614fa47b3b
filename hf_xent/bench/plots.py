"""Plots of time and memory as PNG: against the number of tokens and the vocabulary, or of shapes side by side."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..system.figures import panels, save
from .contestants import CONTESTANTS, FLOOR
from .objectives import PLAIN
from .rows import OK, Row

AXES = {"N": ("tokens", "tokens N"), "V": ("vocabulary", "vocabulary V")}  # field of Row -> file name, label
PANELS = {"time_ms": ("time", "ms"), "peak_mib": ("peak memory beyond inputs and gradients", "MiB")}
BARS = {"matmul_ratio": "time / three bare matmuls", "peak_mib": "peak memory beyond inputs and gradients, MiB"}
OURS = ("#d1495b", "#f08a4b", "#7b2d43", "#e5a4b4")
OTHERS = ("#30343b", "#8a8f98", "#b9bdc4", "#1f77b4", "#6baed6", "#2ca02c", "#9467bd", "#8c6d31", "#17becf")


def draw(rows: Iterable[Row], target: Path) -> list[Path]:
    """For each dtype, `<target>-<dtype>-tokens.png` and `-vocabulary.png` where these vary; returns their paths.

    Where several shapes of one source differ in more than one number, `-shapes.png` has them side by side.
    """
    fine = [row for row in rows if row.status == OK and row.objective == PLAIN]
    paths = []
    for dtype in sorted({row.dtype for row in fine}):
        alike = [row for row in fine if row.dtype == dtype]
        drawn = {name: series for axis, (name, _) in AXES.items() if (series := longest(alike, axis))}
        for axis, (name, _) in AXES.items():
            if name in drawn:
                paths.append(_figure(drawn[name], axis, target.with_name(f"{target.name}-{dtype}-{name}.png")))
        groups = [[row for row in alike if row.source == source] for source in {row.source: None for row in alike}]
        same = max(groups, key=lambda group: len({_shape(row) for row in group}))
        if not drawn and len({_shape(row) for row in same}) > 1:
            paths.append(_bars(same, target.with_name(f"{target.name}-{dtype}-shapes.png")))
    return paths


def _shape(row: Row) -> str:
    return f"N={row.N}, V={row.V}, D={row.D}"


def _bars(rows: list[Row], path: Path) -> Path:
    """A bar for each contestant and shape: its time relative to the bare matmuls, and its peak memory."""
    known = [name for name in CONTESTANTS if name != FLOOR and any(row.contestant == name for row in rows)]
    shapes = list(dict.fromkeys(map(_shape, rows)))
    figure, axes = panels(2, 12, 1.5 + 0.45 * len(known))
    for panel, (field, title) in zip(axes, BARS.items(), strict=True):
        for index, shape in enumerate(shapes):
            found = {row.contestant: getattr(row, field) for row in rows if _shape(row) == shape}
            places = [place + 0.8 * (index + 0.5) / len(shapes) - 0.4 for place in range(len(known))]
            values = [found.get(name) or 0.0 for name in known]
            panel.barh(places, values, 0.8 / len(shapes), label=shape, color=OTHERS[3 + index % (len(OTHERS) - 3)])
        panel.set(title=title)
        panel.set_yticks(range(len(known)), known)
        panel.invert_yaxis()
        panel.grid(axis="x", alpha=0.25)
    if any(row.peak_mib for row in rows):  # a logarithmic axis needs a number
        axes[1].set_xscale("log")
    axes[0].axvline(1, color="#9aa0a6", ls="--", lw=1)
    axes[1].set_yticklabels([])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(shapes), frameon=False)
    row = rows[0]
    figure.suptitle(f"{row.device}; {row.source}, {row.dtype}", fontsize=10)
    return save(figure, path)


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

"""Curves of representation geometry: RankMe and alpha-ReQ against tokens with bands, and the table of changes.

draw_curves({"text": [Path("out/text-0/geometry.csv"), ...]}, Path("out/curves.png"))
change(before, after)                       the paired difference of two models on the same documents
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics.geometry import MEASURES, SPREAD, measures
from ..metrics.resampling import bootstrap_sd
from ..system.figures import panels, save

LABELS = {"rankme": "RankMe (covariance)", "singular_rankme": "RankMe (singular values)", "alpha": "alpha-ReQ"}
COLORS = ("#d1495b", "#30638e", "#8a8f98", "#edae49", "#00798c")
NORMAL = 1.96
"""Standard deviations on each side of a 95 % interval."""


def read_curve(file: Path, layer: int = -1) -> dict[str, np.ndarray]:
    """The columns of a file of `GeometryCallback`, for one layer.

    Args:
        file: The CSV file.
        layer: The layer, as it was given to the callback.

    Returns:
        Column -> its values in the order of the steps, float64.

    Raises:
        ValueError: The file has no rows of this layer.
    """
    with Path(file).open(newline="", encoding="utf-8") as opened:
        rows = [row for row in csv.DictReader(opened) if int(row["layer"]) == layer]
    if not rows:
        raise ValueError(f"layer is {layer}, of which {file} has no rows: choose another")
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def draw_curves(
    arms: Mapping[str, Sequence[Path]], path: Path, *, columns: Sequence[str] = ("rankme", "alpha"), layer: int = -1
) -> Path:
    """Write a PNG of measures against tokens: a line for each seed, and its band over documents.

    Bands are value +- 1.96 bootstrap standard deviations, where the file has them. The model before the training, at 0
    tokens, is drawn at the left end of the logarithmic axis.

    Args:
        arms: Arm -> the files of its seeds.
        path: The file to write.
        columns: The measures, one panel each.
        layer: The layer.

    Returns:
        The path.

    Raises:
        ValueError: A file has no rows of the layer.
    """
    figure, axes = panels(len(columns), 5 * len(columns), 3.8)
    curves = {arm: [read_curve(file, layer) for file in files] for arm, files in arms.items()}
    seen = [tokens for runs in curves.values() for run in runs for tokens in run["tokens"] if tokens]
    least = min(seen, default=2.0)
    for axis, column in zip(axes, columns, strict=True):
        for (arm, runs), color in zip(curves.items(), COLORS * len(curves), strict=False):
            for i, run in enumerate(runs):
                x, y = np.maximum(run["tokens"], least / 2), run[column]
                axis.plot(x, y, color=color, lw=1.2, marker=".", label=None if i else arm)
                half = NORMAL * run.get(SPREAD.format(column), np.full(len(x), np.nan))
                if np.isfinite(y - half).any():  # a collapsed resample has no alpha
                    axis.fill_between(x, y - half, y + half, color=color, alpha=0.12, lw=0)
        axis.set(xscale="log", xlabel="tokens (left end: before the training)", title=LABELS.get(column, column))
    axes[0].legend(frameon=False)
    return save(figure, path)


def change(
    before: np.ndarray, after: np.ndarray, *, resamples: int = 100, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """How the measures change from one model to another on the same documents.

    Args:
        before: Features of the first model [M, D].
        after: Features of the second model on the same documents, in the same order [M, D'].
        resamples: Resamples of the documents, of both models at once.
        seed: Seed of the resampling.

    Returns:
        Measure -> (before, change, standard deviation of the change over documents).

    Raises:
        ValueError: As for `hf_xent.metrics.geometry.measures`, or if the numbers of documents differ.
    """

    def difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        old, new = measures(first), measures(second)
        return np.array([new[name] - old[name] for name in MEASURES])

    found, spread = difference(before, after), bootstrap_sd(difference, before, after, resamples=resamples, seed=seed)
    start = measures(before)
    return {name: (start[name], float(found[i]), float(spread[i])) for i, name in enumerate(MEASURES)}


def table(arms: Mapping[str, Sequence[Path]], column: str = "rankme", layer: int = -1) -> str:
    """A Markdown table of a measure along the training: before it, its least, its largest value, and at the end.

    Args:
        arms: Arm -> the files of its seeds.
        column: The measure.
        layer: The layer.

    Returns:
        One line for each arm and seed; values with 1.96 bootstrap standard deviations where the file has them.
    """
    lines = [
        f"| {column} | seed | before | least (at tokens) | largest (at tokens) | end |",
        "|---|---|---|---|---|---|",
    ]
    for arm, files in arms.items():
        for seed, file in enumerate(files):
            run = read_curve(file, layer)
            known = np.flatnonzero(np.isfinite(run[column]))  # none, if all features have collapsed
            low, high = (known[f(run[column][known])] if len(known) else 0 for f in (np.argmin, np.argmax))
            ends = [f"{_cell(run, column, i)} ({run['tokens'][i]:.0f})" for i in (low, high)]
            cells = [_cell(run, column, 0), *ends, _cell(run, column, -1)]
            lines.append(f"| {arm} | {seed} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(run: Mapping[str, Any], column: str, index: int) -> str:
    spread = run.get(SPREAD.format(column))
    half = "" if spread is None else f" ± {NORMAL * spread[index]:.2g}"
    return f"{run[column][index]:.4g}{half}"

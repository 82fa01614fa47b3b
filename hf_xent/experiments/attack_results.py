"""What attacks on a classifier have found, its summary, and its table of rows."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics.shares import wilson
from .attack_settings import Attacking


@dataclass(frozen=True)
class Found:
    """What one attack has found, row by row [N]."""

    predicted: list[int]
    """The predictions before."""
    under: list[int]
    """The predictions of the changed inputs."""
    flipped: list[bool]
    """Which rows are wrong under the attack, also those that were wrong before."""
    distance: list[float]
    """How far each was moved, in the units of epsilon."""
    passes: int = 0
    """Forward passes of single rows."""
    seconds: float = 0.0
    folder: str = ""
    """Where the changed inputs are, if they were kept."""


@dataclass
class Attacked:
    """What a run has measured; `summary` has its numbers."""

    names: list[str]
    labels: np.ndarray
    indices: np.ndarray
    found: dict[str, Found] = field(default_factory=dict)
    """Attack -> what it has found."""
    unlabeled: int = 0
    masking: dict[str, Any] | None = None


def summary(run: Attacking, outcome: Attacked) -> dict[str, Any]:
    """The numbers of a run: clean and robust accuracy with intervals, also by class, passes of a row, and seconds."""
    first = next(iter(outcome.found.values()))
    clean = np.asarray(first.predicted) == outcome.labels
    counts = np.bincount(outcome.labels, minlength=len(outcome.names))
    present = {i: name for i, name in enumerate(outcome.names) if counts[i]}

    def shares(right: np.ndarray) -> dict[str, Any]:
        each = {name: float(right[outcome.labels == i].mean()) for i, name in present.items()}
        low, high = wilson(int(right.sum()), len(right))
        return {"accuracy": float(right.mean()), "low": low, "high": high, "by_class": each}

    attacks = {}
    for method, found in outcome.found.items():
        folder = {"inputs": found.folder} if found.folder else {}
        attacks[method] = shares(~np.asarray(found.flipped)) | {
            "passes_per_row": found.passes / len(clean),
            "seconds": found.seconds,
            **folder,
        }
    return {
        "model": run.model,
        "dataset": run.dataset,
        "epsilon": run.radius,
        "norm": run.norm,
        "steps": run.steps,
        "rows": len(clean),
        "unlabeled": outcome.unlabeled,
        "rows_by_class": {name: int(counts[i]) for i, name in present.items()},
        "clean": shares(clean),
        "attacks": attacks,
        "masking": outcome.masking,
        "written": str(Path(run.output, "rows.csv")),
    }


def write_rows(file: Path, outcome: Attacked) -> None:
    """Writes a line for each attack and row: classes by name, and the distance in the units of epsilon."""
    names = outcome.names
    with file.open("w", encoding="utf-8", newline="") as opened:
        table = csv.writer(opened)
        table.writerow(["attack", "row", "label", "predicted", "under_attack", "flipped", "distance"])
        for method, found in outcome.found.items():
            each = (found.predicted, found.under, found.flipped, found.distance)
            for row, label, *classes, flipped, distance in zip(outcome.indices, outcome.labels, *each, strict=True):
                cells = [names[label], *(names[i] for i in classes), int(flipped), f"{distance:.6g}"]
                table.writerow([method, int(row), *cells])

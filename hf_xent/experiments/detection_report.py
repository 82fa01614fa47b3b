"""The report of a detection run as JSON beside its scores: settings, means, metrics, and the points of ROC curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..system.files import replace_atomically
from .detection import Detection

SUFFIX = ".report.json"


def report_file(output: str | Path) -> Path:
    """The report that belongs to a file of scores: 'scores.report.json' beside 'scores.csv'."""
    return Path(output).with_suffix(SUFFIX)


def roc_points(scores: Mapping[str, np.ndarray], labels: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """The corners of the ROC curve of each score.

    Args:
        scores: Score -> its values [N]; a text with NaN is left out.
        labels: 1 for the positive class, 0 for the other, NaN for neither, [N].

    Returns:
        Score -> `fpr` and `tpr`, false and true positive rates from 0 to 1; points inside of a straight piece, which
        change nothing, are left out.
    """
    from ..detection import get
    from ..metrics.ranking import roc

    points = {}
    for name, values in scores.items():
        kept = np.isfinite(values) & np.isfinite(labels)
        false, true = roc(labels[kept], get(name).oriented(values)[kept])
        across, up = np.diff(false), np.diff(true)
        turn = np.abs(across[1:] * up[:-1] - across[:-1] * up[1:]) > 1e-15
        corner = np.concatenate([[True], turn, [True]])
        points[name] = {"fpr": false[corner].tolist(), "tpr": true[corner].tolist()}
    return points


def write_report(run: Detection, summary: Mapping[str, Any], roc: Mapping[str, Any] | None) -> Path:
    """Writes the report of a run; returns its file, which `hf-xent show` reads.

    Args:
        run: The settings of the run.
        summary: What `hf_xent.experiments.scoring.summarize` returns.
        roc: What `roc_points` returns, or None without labels.
    """
    stored = {"run": asdict(run), "summary": summary, **({} if roc is None else {"roc": roc})}
    text = json.dumps(stored, indent=1)
    return replace_atomically(report_file(run.output), lambda draft: draft.write_text(text, encoding="utf-8"))

"""Plots of experiments: loss and memory of fine-tuning runs against steps, and ROC curves of scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..system.figures import panels, save
from .finetuning import PATCHED, STOCK, Outcome

STYLES = {STOCK: {"color": "#8a8f98", "lw": 5, "alpha": 0.6}, PATCHED: {"color": "#d1495b", "lw": 1.6}}


def draw_training(outcomes: list[Outcome], path: Path, title: str) -> Path:
    """Write a PNG of the loss curves over each other (left) and each step's peak memory (right); returns its path."""
    figure, (left, right) = panels(2, 10, 3.8)
    for outcome in outcomes:
        style = STYLES[outcome.arm]
        steps = range(1, len(outcome.losses) + 1)
        left.plot(steps, outcome.losses, label=outcome.arm, **style)
        right.plot(range(1, len(outcome.memory) + 1), [m / 2**20 for m in outcome.memory], label=outcome.arm, **style)
    left.set(xlabel="step", ylabel="loss (nats per token)", title="loss")
    right.set(xlabel="step", ylabel="peak memory of the step (MiB)", title="memory", ylim=(0, None))
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    return save(figure, path)


def draw_roc(scores: Mapping[str, np.ndarray], labels: np.ndarray, metrics: Mapping[str, Any], path: Path) -> Path:
    """Write a PNG of the ROC curve of each score; returns its path.

    The axis of false positives is logarithmic, since detectors are compared at low false positive rates.

    Args:
        scores: Score -> its values [N]; a text with NaN is left out.
        labels: 1 for the positive class, 0 for the other, NaN for neither, [N].
        metrics: Score -> its metrics, of which the legend shows `auroc`.
        path: The file to write.
    """
    from ..detection import get  # lazy: the figures of training need no scores
    from ..metrics.ranking import roc

    figure, [axis] = panels(1, 5.2, 4.4)
    smallest_rate = 1 / max(2, int((labels == 0).sum()))
    for name, values in scores.items():
        kept = np.isfinite(values) & np.isfinite(labels)
        false, true = roc(labels[kept], get(name).oriented(values)[kept])
        axis.step(
            np.maximum(false, smallest_rate / 2), true, where="post", label=f"{name} ({metrics[name]['auroc']:.3f})"
        )
    chance = np.geomspace(smallest_rate / 2, 1)
    axis.plot(chance, chance, color="#8a8f98", linestyle=":", label="chance (0.500)")
    axis.set(xscale="log", xlabel="false positive rate", ylabel="true positive rate", title="ROC (AUROC)")
    axis.legend(frameon=False, fontsize=8)
    return save(figure, path)

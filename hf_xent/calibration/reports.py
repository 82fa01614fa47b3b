"""Measures of calibrated probabilities, and the reliability diagram.

    accuracy    share of rows whose largest class is the label; a temperature does not change it
    ece, ks     `hf_xent.metrics.calibration`: 25 bins (low, high], and without bins
    brier       mean of (confidence - c)^2, c = 1 if the row is correct, else 0
    nll         mean of -log p_y, nats
    auroc       of the confidence, between correct and wrong rows: whether it tells them apart; nan without both

ECE and AUROC are read together: a constant confidence equal to the accuracy has an ECE of 0 and an AUROC of 1/2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..metrics.calibration import binned, calibration_error, cumulative_error
from .inputs import labelled
from .objectives import correct

BINS = 25


def report(probs: Any, labels: Any) -> dict[str, float]:
    """The measures of the module's docstring.

    Args:
        probs: Probabilities of classes [M, C], as a calibrator returns them.
        labels: The class of each row [M]; rows labelled -100 are left out.

    Returns:
        Measure -> number.

    Raises:
        ValueError: Rows that are no distributions, or labels that do not fit.
    """
    from ..metrics.ranking import auroc  # lazy: scikit-learn takes a second

    p, y = _distributions(probs, labels)
    confidence, right = _confidence(p, y)
    both = bool(right.any()) and not bool(right.all())
    return {
        "accuracy": float(right.double().mean()),
        "ece": calibration_error(binned(confidence, right, BINS, closed="right")),
        "ks": cumulative_error(confidence, right),
        "brier": float((confidence - right.double()).square().mean()),
        "nll": float(-p.gather(-1, y[:, None]).log().mean()),
        "auroc": auroc(right.long().cpu(), confidence.cpu()) if both else float("nan"),
    }


def draw(arms: Mapping[str, Any], labels: Any, path: str | Path, bins: int = 10) -> Path:
    """Write a PNG with a reliability diagram, accuracy against confidence (left), and how many rows have it (right).

    Args:
        arms: Name -> probabilities [M, C] of the same rows.
        labels: The class of each row [M]; rows labelled -100 are left out.
        path: The file to write.
        bins: Number of bins; empty ones are left out.

    Returns:
        The path.

    Raises:
        ValueError: As `report`.
    """
    from ..system.figures import panels, save

    figure, (left, right) = panels(2, 9, 3.8)
    left.plot([0, 1], [0, 1], color="#8a8f98", linestyle=":")
    for name, probs in arms.items():
        sums = binned(*_confidence(*_distributions(probs, labels)), bins, closed="right").cpu()
        some = sums[0] > 0
        count, hits, confidence = sums[:, some]
        left.plot(confidence / count, hits / count, marker="o", markersize=4, label=name)
        right.stairs(sums[0].numpy(), torch.linspace(0, 1, bins + 1).numpy(), label=name)
    left.set(xlabel="confidence", ylabel="accuracy", title="reliability", xlim=(0, 1), ylim=(0, 1))
    right.set(xlabel="confidence", ylabel="rows", title="how often", xlim=(0, 1))
    left.legend(frameon=False, fontsize=8)
    return save(figure, Path(path))


def _confidence(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return p.amax(-1).clamp(max=1), correct(p, y)


def _distributions(probs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Probabilities in float64 and labels of the rows that have one."""
    p = torch.as_tensor(probs).double()
    if p.ndim != 2 or p.shape[1] < 2:
        raise ValueError(f"probs has shape {list(p.shape)}: pass probabilities [M, C] of at least two classes")
    if not ((p >= 0).all() and ((p.sum(-1) - 1).abs() <= 1e-4).all()):  # nan fails both
        raise ValueError("probs has rows that are no distributions: pass what a calibrator returns, or a softmax")
    y, kept = labelled(labels, p)
    return p[kept], y

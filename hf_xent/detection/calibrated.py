"""From a score to the probability of the positive class (a member, a text of a machine), on texts with labels.

    z = a s + b               s: the oriented score; a, b: logistic regression (Platt)
    p = sigma(z / T)          T = 1, or of a `hf_xent.calibration.Calibrator`

A score has any unit and any zero, so slope and offset come first. Their targets are (n1 + 1) / (n1 + 2) and
1 / (n0 + 2) instead of 1 and 0, which keeps them finite where the classes are apart. T may be read from views: the same
score of changed copies of a text, such as a cut or a lower-cased one.

    found = detection.calibrate("min_k_pp", values["min_k_pp"], labels)
    p = found(scorer(new_texts)["min_k_pp"])

Source: Platt 1999, Probabilistic Outputs for Support Vector Machines and Comparisons to Regularized Likelihood Methods;
Liu et al. 2024, arXiv:2404.13016, for T of views.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from ..calibration import Calibrator, fit
from ..calibration.calibrator import metadata_of
from .scores import get

KIND = "hf_xent_calibrated_score"


@dataclass(frozen=True)
class CalibratedScore:
    """A map from values of a score to probabilities; `calibrate` makes one.

    Args:
        score: The name of the score, with options if any; its direction is known by it.
        slope: a, of the oriented score.
        offset: b.
        calibrator: What divides the log-odds.
    """

    score: str
    slope: float
    offset: float
    calibrator: Calibrator

    def __call__(self, values: ArrayLike, views: ArrayLike | None = None) -> np.ndarray:
        """The probability of the positive class.

        Args:
            values: Values of the score [N], as `TextScorer` returns them.
            views: The score's values of the changed copies [V, N], in the order of the fit.

        Returns:
            Float64 [N]; NaN for a text whose value, or a view's, is NaN.

        Raises:
            ValueError: As a call of the calibrator.
        """
        z = self._log_odds(values)
        v = None if views is None else self._log_odds(views)
        kept = _finite(z, v)
        p = np.full(len(z), np.nan)
        if kept.any():
            seen = None if v is None else v[:, kept]
            p[kept] = self.calibrator(z[kept], seen)[:, 1].detach().cpu().numpy()
        return p

    def _log_odds(self, values: ArrayLike) -> np.ndarray:
        return self.slope * get(self.score).oriented(values) + self.offset

    def save(self, file: str | Path) -> Path:
        """Write it as safetensors, complete or not at all; returns the path."""
        own = {"score": self.score, "slope": self.slope, "offset": self.offset}
        return self.calibrator.save(file, **{KIND: json.dumps(own)})

    @classmethod
    def load(cls, file: str | Path) -> CalibratedScore:
        """A calibrated score that was saved. Raises: ValueError for a file of something else."""
        return cls(**json.loads(metadata_of(file, KIND)[KIND]), calibrator=Calibrator.load(file))


def calibrate(
    score: str,
    values: ArrayLike,
    labels: ArrayLike,
    views: ArrayLike | None = None,
    objective: str | None = None,
    **options: Any,
) -> CalibratedScore:
    """A calibrated score, from texts whose class is known and which the detector was not chosen by.

    Args:
        score: A name in `SCORES`, with options if any.
        values: Its values [N], as `TextScorer` returns them; texts with NaN are left out.
        labels: 1 for the positive class, 0 for the other; texts with NaN or None are left out.
        views: The score's values of V changed copies of every text [V, N].
        objective: What T is fitted to, of `hf_xent.calibration.OBJECTIVES`; None for T = 1, which is Platt's method.
        **options: Further options of `hf_xent.calibration.fit`: balanced, training.

    Returns:
        The calibrated score.

    Raises:
        ValueError: An unknown score, labels of one class alone or other than 0 and 1, shapes that differ, or views or
            options without an objective.
    """
    s = get(score).oriented(values)
    seen = None if views is None else get(score).oriented(views)
    truth = np.asarray(labels, dtype=np.float64)
    if truth.shape != s.shape or s.ndim != 1 or (seen is not None and seen.shape[1:] != s.shape):
        shapes = f"values has shape {s.shape}, labels {truth.shape}" + ("" if seen is None else f", views {seen.shape}")
        raise ValueError(f"{shapes}: pass one value and one label for every text, and views as [V, N]")
    if objective is None and (views is not None or options):
        raise ValueError("objective is None, so that T = 1: choose one, such as 'ca', for views and options to count")
    kept = _finite(s, seen) & np.isfinite(truth)
    s, truth = s[kept], truth[kept]
    if sorted(set(truth.tolist())) != [0, 1]:
        raise ValueError(
            f"labels has the values {sorted(set(truth.tolist()))}: pass 1 (positive) and 0, both, no other"
        )
    slope, offset = _platt(s, truth)
    calibrator = Calibrator(1).requires_grad_(False)
    if objective is not None:
        z, v = (None if x is None else slope * x + offset for x in (s, None if seen is None else seen[:, kept]))
        calibrator = fit(z, truth.astype(np.int64), v, objective, **options)
    return CalibratedScore(score, slope, offset, calibrator)


def _platt(s: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the logistic regression on smoothed targets."""
    center, scale = s.mean(), s.std() or 1.0
    x = torch.from_numpy((s - center) / scale)
    ones = truth.sum()
    targets = torch.from_numpy(np.where(truth == 1, (ones + 1) / (ones + 2), 1 / (len(truth) - ones + 2)))
    line = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [line], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.binary_cross_entropy_with_logits(line[0] * x + line[1], targets)
        value.backward()
        return value

    optimizer.step(loss)
    slope, offset = line.tolist()
    return float(slope / scale), float(offset - slope * center / scale)


def _finite(z: np.ndarray, v: np.ndarray | None) -> np.ndarray:
    return np.isfinite(z) if v is None else np.isfinite(z) & np.isfinite(v).all(0)

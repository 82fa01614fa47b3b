"""How well scores separate two classes, in particular at low false positive rates; based on scikit-learn's ROC curve.

    roc                 (FPR, TPR) of `score >= threshold` for every threshold, joined by straight lines
    auroc               area under it; 1/2 is chance
    tpr_at_fpr(f)       TPR of its last point with FPR <= f, not interpolated; with `strict`, FPR < f
    fpr_at_tpr(t)       FPR of its first point with TPR >= t
    pauc(f)             area over FPR <= f, scaled so that chance is 1/2 and perfect is 1 (McClish)
    tpauc(f, t)         area over FPR <= f and above TPR = t, as a share of (1 - t) f: two-way, can be 0
    threshold_at_fpr(f) the least threshold that at most a share f of the negatives reaches

Direction: labels are 1 (member, generated) and 0, and a larger score indicates label 1; negate scores that indicate 0
(as `hf_xent.detection.Score.oriented` does). Repositories differ on "TPR@5%FPR": detect-pretrain-code, DC-PDD and mimir
take FPR < 5 %, mink-plus-plus and ACMIA FPR <= 5 %, the default here.

`bootstrap` computes an interval for any of them: both classes are resampled with replacement, each at its own size, and
the interval is that of the percentiles. Scores are compared in float64, since 1 - 1e-9 and 1 are equal in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from sklearn import config_context
from sklearn.metrics import auc, roc_auc_score, roc_curve

from ..options.ranges import is_integer, is_number


@dataclass(frozen=True)
class Interval:
    """A metric's value with its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """The probability that a positive has a larger score than a negative; ties count one half.

    Args:
        labels: The label of each text [N], 1 (member, generated) or 0.
        scores: The score of each text [N]; a larger one indicates label 1.

    Returns:
        AUROC in [0, 1]; 1/2 is chance.

    Raises:
        ValueError: Labels of one class alone or other than 0 and 1, scores that are not finite, or shapes that differ.
    """
    return float(roc_auc_score(*_checked(labels, scores)))


def tpr_at_fpr(labels: ArrayLike, scores: ArrayLike, fpr: float = 0.05, *, strict: bool = False) -> float:
    """The largest TPR whose threshold has at most a given FPR.

    Args:
        labels: The label of each text [N], 1 (member, generated) or 0.
        scores: The score of each text [N]; a larger one indicates label 1.
        fpr: The largest share of the negatives that is flagged, in [0, 1].
        strict: Whether that share has to be less than `fpr`.

    Returns:
        TPR in [0, 1], not interpolated.

    Raises:
        ValueError: Labels of one class alone or other than 0 and 1, scores that are not finite, or shapes that differ;
            a share outside of [0, 1].
    """
    _check_share("fpr", fpr)
    false, true = roc(labels, scores)
    return float(true[(false < fpr) if strict else (false <= fpr)].max(initial=0.0))


def fpr_at_tpr(labels: ArrayLike, scores: ArrayLike, tpr: float = 0.95) -> float:
    """The least FPR whose threshold has at least a given TPR; smaller is better.

    Args:
        labels: The label of each text [N], 1 (member, generated) or 0.
        scores: The score of each text [N]; a larger one indicates label 1.
        tpr: The least share of the positives that is flagged, in [0, 1].

    Returns:
        FPR in [0, 1].

    Raises:
        ValueError: Labels of one class alone or other than 0 and 1, scores that are not finite, or shapes that differ;
            a share outside of [0, 1].
    """
    _check_share("tpr", tpr)
    false, true = roc(labels, scores)
    return float(false[true >= tpr].min())


def pauc(labels: ArrayLike, scores: ArrayLike, max_fpr: float = 0.05) -> float:
    """One-way partial AUC over FPR <= `max_fpr`, scaled so that chance is 1/2. Source: McClish 1989.

    Args:
        labels: The label of each text [N], 1 (member, generated) or 0.
        scores: The score of each text [N]; a larger one indicates label 1.
        max_fpr: The largest FPR of the area, in (0, 1].

    Returns:
        The scaled area, in [0.5, 1] if better than chance.

    Raises:
        ValueError: Labels of one class alone or other than 0 and 1, scores that are not finite, or shapes that differ;
            a max_fpr outside of (0, 1].
    """
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr is {max_fpr}: choose 0 < max_fpr <= 1")
    return float(roc_auc_score(*_checked(labels, scores), max_fpr=max_fpr))


def tpauc(labels: ArrayLike, scores: ArrayLike, max_fpr: float = 0.05, min_tpr: float = 0.8) -> float:
    """Two-way partial AUC in [0, 1]: integral of (TPR - min_tpr)+ over FPR <= max_fpr, over (1 - min_tpr) max_fpr.

    libauc's estimate (the AUC of the hardest negatives and positives) is equal where the shares are whole numbers of
    rows.

    Args:
        labels: The label of each text [N], 1 (member, generated) or 0.
        scores: The score of each text [N]; a larger one indicates label 1.
        max_fpr: The largest FPR of the area, in (0, 1].
        min_tpr: The least TPR of the area, in [0, 1).

    Returns:
        The share of the area, in [0, 1].

    Raises:
        ValueError: Labels of one class alone or other than 0 and 1, scores that are not finite, or shapes that differ;
            max_fpr or min_tpr out of range.
    """
    if not (0 < max_fpr <= 1 and 0 <= min_tpr < 1):
        raise ValueError(f"max_fpr is {max_fpr}, min_tpr is {min_tpr}: choose 0 < max_fpr <= 1 and 0 <= min_tpr < 1")
    false, true = roc(labels, scores)
    along = false + true  # strictly increasing along the curve, which has vertical and horizontal steps
    ends = np.interp(max_fpr, false, along), np.interp(min_tpr, true, along)
    grid = np.union1d(along, ends)  # corners of the curve, and where it crosses the bounds
    x, y = np.interp(grid, along, false), np.interp(grid, along, true)
    area = auc(np.minimum(x, max_fpr), np.maximum(y - min_tpr, 0))
    return float(area / ((1 - min_tpr) * max_fpr))


def threshold_at_fpr(negatives: ArrayLike, fpr: float = 0.05) -> float:
    """The least threshold with at most a share `fpr` of the negatives at or above it.

    It is meant for `score >= threshold`; calibrate it on other data than it is used on. With fewer than 1 / fpr
    negatives it is above all of their scores.

    Args:
        negatives: Scores of texts with label 0 [N].
        fpr: The share of the negatives, in [0, 1].

    Returns:
        The threshold.

    Raises:
        ValueError: No score, one that is not finite, or a share outside of [0, 1].
    """
    _check_share("fpr", fpr)
    ranked = np.sort(np.asarray(negatives, dtype=np.float64))[::-1]
    if not len(ranked) or not np.isfinite(ranked).all():
        raise ValueError(f"negatives has {len(ranked)} scores: pass at least one, and finite ones only")
    allowed = int(fpr * len(ranked) + 1e-9)  # 0.29 * 100 is 28.999999999999996
    return float("-inf") if allowed >= len(ranked) else float(np.nextafter(ranked[allowed], np.inf))


def report(labels: ArrayLike, scores: ArrayLike) -> dict[str, float]:
    """The usual metrics, with their conventions in the names.

    Args:
        labels: The label of each text [N], 1 (member, generated) or 0.
        scores: The score of each text [N]; a larger one indicates label 1.

    Returns:
        AUROC, TPR at 1 % and 5 % FPR, FPR at 95 % TPR, and the partial AUC over 5 % FPR.

    Raises:
        ValueError: Labels of one class alone or other than 0 and 1, scores that are not finite, or shapes that differ.
    """
    return {
        "auroc": auroc(labels, scores),
        "tpr@1%fpr": tpr_at_fpr(labels, scores, 0.01),
        "tpr@5%fpr": tpr_at_fpr(labels, scores, 0.05),
        "fpr@95%tpr": fpr_at_tpr(labels, scores, 0.95),
        "pauc@5%fpr": pauc(labels, scores, 0.05),
    }


def bootstrap(
    metric: Callable[..., float],  # of (labels, scores)
    labels: ArrayLike,
    scores: ArrayLike,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A metric and its percentile interval over resampled texts, stratified by class.

    The interval covers the choice of the texts, not that of the trained model: for that, repeat the training over
    seeds.

    Args:
        metric: A function of labels and scores, such as `auroc`.
        labels: The label of each text [N], 1 (member, generated) or 0.
        scores: The score of each text [N]; a larger one indicates label 1.
        resamples: Number of resamples.
        level: The share of the resamples within the interval, in (0, 1).
        seed: Seed of the resampling.

    Returns:
        The metric's value and its interval.

    Raises:
        ValueError: Labels of one class alone or other than 0 and 1, scores that are not finite, or shapes that differ;
            resamples or a level out of range.
    """
    if not is_integer(resamples) or resamples < 1 or not is_number(level, "(0, 1)"):
        raise ValueError(f"resamples is {resamples!r}, level is {level!r}: choose resamples >= 1 and 0 < level < 1")
    truth, values = _checked(labels, scores)
    positives, negatives = values[truth], values[~truth]
    sorted_labels = np.concatenate([np.ones_like(positives), np.zeros_like(negatives)])
    rng = np.random.default_rng(seed)
    with config_context(assume_finite=True, skip_parameter_validation=True):  # checked above, once
        resampled = [
            metric(sorted_labels, np.concatenate([rng.choice(part, len(part)) for part in (positives, negatives)]))
            for _ in range(resamples)
        ]
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(metric(truth, values), float(low), float(high))


def roc(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """All points of scikit-learn's ROC curve, from (0, 0) to (1, 1), collinear ones included.

    Args:
        labels: The label of each text [N], 1 (member, generated) or 0.
        scores: The score of each text [N]; a larger one indicates label 1.

    Returns:
        FPR and TPR of every point.

    Raises:
        ValueError: Labels of one class alone or other than 0 and 1, scores that are not finite, or shapes that differ.
    """
    false, true, _ = roc_curve(*_checked(labels, scores), drop_intermediate=False)
    return false, true


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: choose a share from 0 to 1, such as 0.05 for 5 %")


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Labels as booleans and scores as float64, [N] each."""
    truth, values = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != values.shape:
        raise ValueError(f"labels has shape {truth.shape}, scores {values.shape}: pass one of each for every text")
    classes = set(np.unique(truth).tolist())
    if classes != {0, 1}:
        raise ValueError(f"labels has the values {sorted(classes)}: pass 1 (positive) and 0, both and no other")
    if bad := int((~np.isfinite(values)).sum()):
        raise ValueError(f"scores has {bad} values that are not finite: leave those texts out")
    return truth.astype(bool), values

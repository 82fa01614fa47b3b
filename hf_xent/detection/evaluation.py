"""What scores are worth on texts with labels, beside what can be told without any model.

The blind baseline is a logistic regression on words and pairs of words, cross-validated: every text is judged by a
classifier that has not seen it. It knows nothing of the model, so where it does better than chance, members and
non-members differ in what they are about (or when they were written), and no score's AUROC is evidence of membership.
PatentMIA and WikiMIA are such sets.

Source: Das, Zhang & Tramer 2024, Blind Baselines Beat Membership Inference Attacks, arXiv:2406.16201; the features are
this project's choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..metrics import ranking as metrics
from ..options.ranges import check_count
from .scores import get

BLIND = "blind"


def blind(texts: Sequence[str], labels: ArrayLike, *, folds: int = 5, seed: int = 0) -> np.ndarray:
    """Scores [N] of texts by their words alone, each from the folds without it; larger speaks for label 1.

    A class with fewer texts than `folds` gets as many folds as it has texts. A text without words, or without a label
    (NaN, None), has NaN. Raises: ValueError if a class has one text or none.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # lazy: only where there are labels
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    check_count("folds", folds, 2)
    truth = _numbers(labels, texts=texts)
    judged = np.isfinite(truth) & np.array([isinstance(text, str) and bool(text.strip()) for text in texts], dtype=bool)
    least = int(np.bincount(truth[judged].astype(int), minlength=2).min())
    if least < 2:
        raise ValueError(f"one class has {least} texts: cross-validation needs two of each at least")
    words = TfidfVectorizer(token_pattern=r"(?u)\w+|[^\w\s]", ngram_range=(1, 2), sublinear_tf=True)
    splits = StratifiedKFold(min(folds, least), shuffle=True, random_state=seed)
    classifier = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000))
    known = [text for text, kept in zip(texts, judged, strict=True) if kept]
    found = np.full(len(truth), np.nan)
    found[judged] = cross_val_predict(classifier, known, truth[judged], cv=splits, method="decision_function")
    return found


def evaluate(
    found: Mapping[str, ArrayLike], labels: ArrayLike, texts: Sequence[str] | None = None, *, resamples: int = 1000
) -> dict[str, dict[str, float]]:
    """`metrics.report` of every score, turned into its direction, with the 95 % interval of its AUROC.

    With `texts`, the last row is the blind baseline. Texts with a NaN are left out, be it the score or the label (None
    counts as NaN), and an empty one in the baseline too; `texts` in a row counts the others. Raises: ValueError for
    labels that are no numbers, or for scores or texts of another number.
    """
    truth = _numbers(labels, **found, **({} if texts is None else {"texts": texts}))
    oriented = {name: get(name).oriented(values) for name, values in found.items()}
    if texts is not None:
        oriented[BLIND] = blind(texts, truth)
    rows = {}
    for name, values in oriented.items():
        kept = np.isfinite(values) & np.isfinite(truth)
        interval = metrics.bootstrap(metrics.auroc, truth[kept], values[kept], resamples=resamples)
        row = metrics.report(truth[kept], values[kept])
        rows[name] = row | {"auroc_low": interval.low, "auroc_high": interval.high, "texts": int(kept.sum())}
    return rows


def _numbers(labels: ArrayLike, **others: Any) -> np.ndarray:
    """Labels in float64, None as NaN. Raises: ValueError for words, and where others are not as many."""
    try:
        truth = np.asarray(labels, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"labels are no numbers ({error}): pass 1 for the positive class, 0 for the other") from error
    if wrong := [name for name, values in others.items() if len(values) != len(truth)]:
        raise ValueError(
            f"{wrong[0]} has {len(others[wrong[0]])} entries, labels {len(truth)}: pass one of each a text"
        )
    return truth

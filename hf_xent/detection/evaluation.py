"""Evaluation of scores on texts with labels, beside that of a classifier of words, which uses no model.

The blind baseline is a logistic regression on words and pairs of words, cross-validated: every text is scored by a
classifier that was not trained on it. In Chinese and Japanese, whose words are not apart, each character counts as a
word. It does not use the model, so if it is better than chance, members and non-members differ in their topics (or in
when they were written), and no score's AUROC is evidence of membership. PatentMIA and WikiMIA are such data sets.

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
from ..system.renamed import parameters
from .scores import get

BLIND = "blind"
_UNSPACED = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Chinese characters
_WORD = rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]"


def blind(texts: Sequence[str], labels: ArrayLike, *, folds: int = 5, seed: int = 0) -> np.ndarray:
    """Scores texts by their words alone, each by a classifier that was trained on the folds without it.

    Args:
        texts: N strings.
        labels: 1 for the positive class, 0 for the other; NaN or None where it is not known.
        folds: Number of folds of the cross-validation, at most the number of texts in the smaller class.
        seed: Seed of the assignment to folds.

    Returns:
        Float64 [N], larger for label 1; NaN for a text without words or without a label.

    Raises:
        ValueError: If a class has one text or none, labels are not numbers, or texts and labels differ in number.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # lazy: only where there are labels
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    check_count("folds", folds, 2)
    truth = _numbers(labels, texts=texts)
    usable = np.isfinite(truth) & np.array([isinstance(text, str) and bool(text.strip()) for text in texts], dtype=bool)
    least = int(np.bincount(truth[usable].astype(int), minlength=2).min())
    if least < 2:
        raise ValueError(f"one class has {least} texts: cross-validation needs at least two of each")
    words = TfidfVectorizer(token_pattern=_WORD, ngram_range=(1, 2), sublinear_tf=True)
    splits = StratifiedKFold(min(folds, least), shuffle=True, random_state=seed)
    classifier = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000))
    kept = [text for text, keep in zip(texts, usable, strict=True) if keep]
    scores = np.full(len(truth), np.nan)
    scores[usable] = cross_val_predict(classifier, kept, truth[usable], cv=splits, method="decision_function")
    return scores


@parameters(found="scores")
def evaluate(
    scores: Mapping[str, ArrayLike], labels: ArrayLike, texts: Sequence[str] | None = None, *, resamples: int = 1000
) -> dict[str, dict[str, float]]:
    """How well each score separates the classes, after orienting it so that larger values indicate the positive one.

    Args:
        scores: Score -> its value for each text, as `TextScorer` returns them.
        labels: 1 for the positive class, 0 for the other; NaN or None where it is not known.
        texts: The texts, for the blind baseline; without them it is left out.
        resamples: Number of resamples of the bootstrap that gives the interval.

    Returns:
        Score -> `hf_xent.metrics.ranking.report` with `auroc_low` and `auroc_high`, the 95 % interval of the AUROC, and
        `texts`, the number of texts that count: those with a score and a label, and in the baseline with words. The
        baseline is the last row, `BLIND`.

    Raises:
        ValueError: For an unknown score, labels that are not numbers, or scores or texts that differ from them in
            number.
    """
    truth = _numbers(labels, **scores, **({} if texts is None else {"texts": texts}))
    oriented = {name: get(name).oriented(values) for name, values in scores.items()}
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
    """Labels in float64, None as NaN. Raises: ValueError for words, and where others differ from them in number."""
    try:
        truth = np.asarray(labels, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"labels are not numbers ({error}): pass 1 for the positive class, 0 for the other") from error
    if wrong := [name for name, values in others.items() if len(values) != len(truth)]:
        raise ValueError(
            f"{wrong[0]} has {len(others[wrong[0]])} entries, labels {len(truth)}: pass one of each for every text"
        )
    return truth

"""Detection metrics: the method sheets' worked numbers, scikit-learn, brute force over thresholds, and coverage."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from hf_xent.metrics import ranking as metrics

POSITIVES = [0.9, 0.8, 0.7, 0.5, 0.3]
NEGATIVES = [0.85, 0.75, 0.6, 0.55, 0.4, 0.35, 0.2, 0.15, 0.1, 0.05]
TOY = [1] * 5 + [0] * 10, POSITIVES + NEGATIVES


def normal(positives=200, negatives=800, seed=0):
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(1.5, 1, positives), rng.normal(0, 1, negatives)])
    return np.repeat([1, 0], [positives, negatives]), scores


def test_the_toys_worked_by_hand():
    assert metrics.auroc(*TOY) == pytest.approx(0.74)
    assert metrics.pauc(*TOY, 0.3) == pytest.approx(0.647059, abs=1e-6)
    for max_fpr, min_tpr, value in ((0.5, 0.4, 0.266667), (0.3, 0.6, 0), (0.2, 0.2, 0.125)):
        assert metrics.tpauc(*TOY, max_fpr, min_tpr) == pytest.approx(value, abs=1e-6)


def test_the_published_conventions_on_normal_scores():
    data = normal()
    assert metrics.auroc(*data) == pytest.approx(0.873394, abs=1e-6)
    assert metrics.pauc(*data) == pytest.approx(0.658013, abs=1e-6)
    assert metrics.tpauc(*data, 0.05, 0) == pytest.approx(0.333125, abs=1e-6)
    for max_fpr, min_tpr, value in ((0.3, 0.4, 0.467118), (0.05, 0.8, 0), (0.5, 0.5, 0.564175)):
        assert metrics.tpauc(*data, max_fpr, min_tpr) == pytest.approx(value, abs=1e-6)
    assert (metrics.tpr_at_fpr(*data), metrics.tpr_at_fpr(*data, strict=True)) == (0.525, 0.51)
    assert (metrics.tpr_at_fpr(*data, 0.01), metrics.tpr_at_fpr(*data, 0.01, strict=True)) == (0.22, 0.21)


@pytest.mark.parametrize("digits", [8, 0])  # 0: many ties
def test_rates_against_all_thresholds(digits):
    labels, scores = normal(30, 41, seed=3)
    scores = scores.round(digits)
    points = [(np.mean(scores[labels == 0] >= t), np.mean(scores[labels == 1] >= t)) for t in [np.inf, *scores]]
    for rate in (0.0, 0.05, 0.1, 0.5, 1.0):
        assert metrics.tpr_at_fpr(labels, scores, rate) == max(t for f, t in points if f <= rate)
        assert metrics.fpr_at_tpr(labels, scores, rate) == min(f for f, t in points if t >= rate)
        threshold = metrics.threshold_at_fpr(scores[labels == 0], rate)
        assert np.mean(scores[labels == 0] >= threshold) <= rate
        assert np.mean(scores[labels == 1] >= threshold) == metrics.tpr_at_fpr(labels, scores, rate)


@pytest.mark.parametrize("digits", [8, 0])
def test_two_way_area_against_a_fine_sum(digits):
    labels, scores = normal(30, 41, seed=3)
    false, true = metrics.roc(labels, scores.round(digits))
    middle = (np.arange(200_000) + 0.5) / 200_000
    curve = np.interp(middle, false, true)
    for max_fpr, min_tpr in ((0.13, 0.37), (0.5, 0.5), (1, 0), (1, 0.9)):
        area = (np.maximum(curve - min_tpr, 0) * (middle < max_fpr)).mean() / ((1 - min_tpr) * max_fpr)
        assert metrics.tpauc(labels, scores.round(digits), max_fpr, min_tpr) == pytest.approx(area, abs=2e-5)


def test_two_way_area_of_the_hardest():
    """Where whole numbers of texts are kept, it is the AUC of the lowest positives and the highest negatives."""
    labels, scores = normal(50, 100, seed=5)
    low, high = np.sort(scores[labels == 1])[:20], np.sort(scores[labels == 0])[-30:]
    hardest = roc_auc_score([1] * 20 + [0] * 30, np.concatenate([low, high]))
    assert metrics.tpauc(labels, scores, max_fpr=0.3, min_tpr=0.6) == pytest.approx(hardest)


def test_ties_perfection_and_float64():
    tied, perfect = ([1, 1, 0, 0], [5.0] * 4), ([1, 1, 0, 0], [4, 3, 2, 1])
    assert metrics.report(*tied) == {
        "auroc": 0.5, "tpr@1%fpr": 0, "tpr@5%fpr": 0, "fpr@95%tpr": 1, "pauc@5%fpr": 0.5
    }  # fmt: skip
    assert metrics.report(*perfect) == {
        "auroc": 1, "tpr@1%fpr": 1, "tpr@5%fpr": 1, "fpr@95%tpr": 0, "pauc@5%fpr": 1
    }  # fmt: skip
    assert metrics.tpauc(*perfect) == 1 and metrics.tpauc(*tied) == 0
    assert metrics.auroc([1, 0], [1.0, 1 - 1e-9]) == 1  # equal in float32


def test_thresholds_at_the_edges():
    assert metrics.threshold_at_fpr(NEGATIVES, 1.0) == -np.inf
    assert metrics.threshold_at_fpr(NEGATIVES, 0.01) == np.nextafter(0.85, 1)
    assert metrics.threshold_at_fpr(range(100), 0.29) == np.nextafter(70.0, 100)  # 0.29 * 100 < 29 in floating point
    with pytest.raises(ValueError, match="negatives has 0 scores"):
        metrics.threshold_at_fpr([])


def test_bootstrap_covers():
    """Of 40 samples from a known population, the 90 % interval holds its AUROC in about 36."""
    truth = 0.8555778  # Phi(1.5 / sqrt 2)
    hits = 0
    for seed in range(40):
        found = metrics.bootstrap(metrics.auroc, *normal(60, 80, seed), resamples=40, level=0.9, seed=seed)
        assert found.low <= found.value <= found.high
        hits += found.low <= truth <= found.high
    assert 30 <= hits <= 40  # 36 expected, with a standard deviation of 1.9


def test_bootstrap_repeats_and_keeps_class_sizes():
    seen = []
    found = metrics.bootstrap(lambda y, s: seen.append((y.sum(), len(y))) or s.mean(), *TOY, resamples=5, seed=1)
    assert set(seen) == {(5, 15)} and len(seen) == 6
    assert found == metrics.bootstrap(lambda y, s: s.mean(), *TOY, resamples=5, seed=1)


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([1, 1], [0.1, 0.2], r"labels has the values \[1\]: pass 1"),
        ([1, 2], [0.1, 0.2], r"labels has the values \[1, 2\]"),
        ([1, 0], [0.1], r"labels has shape \(2,\), scores \(1,\)"),
        ([1, 0, 0], [0.1, np.nan, np.inf], "scores has 2 values that are not finite"),
    ],
)
def test_unusable_input_is_refused(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        metrics.auroc(labels, scores)
    with pytest.raises(ValueError, match="max_fpr is 0, min_tpr is 0"):
        metrics.tpauc(*TOY, 0, 0)


@pytest.mark.parametrize("share", [5, -0.1, float("nan")])
def test_shares_outside_of_their_range_are_refused(share):
    for ask, name in (
        (lambda: metrics.tpr_at_fpr(*TOY, share), "fpr"),
        (lambda: metrics.fpr_at_tpr(*TOY, share), "tpr"),
        (lambda: metrics.threshold_at_fpr(NEGATIVES, share), "fpr"),
        (lambda: metrics.pauc(*TOY, share), "max_fpr"),
        (lambda: metrics.tpauc(*TOY, share), "max_fpr"),
        (lambda: metrics.bootstrap(metrics.auroc, *TOY, level=share), "level"),
    ):
        with pytest.raises(ValueError, match=f"{name} is {share}"):
            ask()
    with pytest.raises(ValueError, match="resamples is 0"):
        metrics.bootstrap(metrics.auroc, *TOY, resamples=0)

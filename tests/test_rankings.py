"""Rankings of a grid of losses, what they find, and the information of contexts: golden values and definitions."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from hf_xent.retrieval import (
    RANKINGS,
    average_precision_at,
    infogain,
    informed,
    interval,
    rank,
    recall_at,
)
from hf_xent.retrieval.information import others

GOLDEN = [[2, 3, 1.8], [2.6, 2.1, 1.9], [2.7, 3.1, 1.5]]
"""Rows are sources; the third candidate is likely whatever the source."""


def losses(sources=7, candidates=5, seed=0):
    return np.random.default_rng(seed).gamma(3.0, 4.0, (sources, candidates))


def test_golden_grid():
    assert rank(GOLDEN).argmin(1).tolist() == [2, 2, 2]
    assert rank(GOLDEN, direction="sources").argmin(1).tolist() == [0, 1, 2]
    for name in ("centered", "minmax", "zscore"):
        assert rank(GOLDEN, name).argmin(1).tolist() == [0, 1, 2], name
    assert rank(GOLDEN, "pmi", alone=[2.5, 3.0, 1.0]).argmin(1).tolist() == [0, 1, 1]


@pytest.mark.parametrize("name", ["centered", "minmax", "zscore"])
def test_normalizers_by_their_formulas(name):
    grid = losses()
    by_formula = {
        "centered": lambda x: x - sum(x) / len(x),
        "minmax": lambda x: (x - min(x)) / (max(x) - min(x)),
        "zscore": lambda x: (x - sum(x) / len(x)) / (sum((x - sum(x) / len(x)) ** 2) / len(x)) ** 0.5,
    }[name]
    expected = np.stack([by_formula(column) for column in grid.T], 1)
    np.testing.assert_allclose(rank(grid, name), expected, rtol=1e-12)
    np.testing.assert_allclose(rank(grid.T, name, direction="sources"), expected, rtol=1e-12)


def test_what_belongs_to_a_candidate_alone_does_not_change_the_order_of_its_sources():
    """Each ranking takes something off a candidate's losses, or scales them: among its sources, raw order stays."""
    grid, alone = losses(), np.arange(5.0)
    order = rank(grid, direction="sources").argsort(1)
    for name in ("centered", "minmax", "zscore"):
        assert np.array_equal(rank(grid, name).T.argsort(1), order), name
    assert np.array_equal(rank(grid, "pmi", alone=alone).T.argsort(1), order)
    assert np.array_equal(rank(grid, "pmi", alone=alone, direction="sources").argsort(1), order)


def test_losses_of_a_likely_candidate_are_no_match():
    """A constant added to a candidate's losses changes raw ranks, and those of no other ranking."""
    grid, shift = losses(), np.array([0.0, 50.0, -50.0, 3.0, 0.0])
    assert not np.array_equal(rank(grid).argsort(1), rank(grid + shift).argsort(1))
    for name in ("centered", "minmax", "zscore"):
        np.testing.assert_allclose(rank(grid + shift, name), rank(grid, name), atol=1e-9)
    np.testing.assert_allclose(rank(grid + shift, "pmi", alone=shift), grid)


def test_candidates_of_equal_losses():
    grid = losses()
    grid[:, 2] = 0.1  # whose mean rounds
    for name in ("minmax", "zscore"):
        assert rank(grid, name)[:, 2].tolist() == [0.0] * 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranking": "best"}, "ranking is 'best': choose one of raw, pmi"),
        ({"direction": "up"}, "direction is 'up': choose one of candidates, sources"),
        ({"ranking": "pmi"}, "ranking is 'pmi', which needs"),
        ({"alone": [1, 2, 3]}, "ranking 'raw' does not use it"),
        ({"ranking": "pmi", "alone": [1, 2]}, r"alone has shape \(2,\): pass one number for each of 3"),
        ({"losses": [[1, np.nan]]}, "finite"),
        ({"losses": [1, 2]}, r"losses has shape \(2,\)"),
    ],
)
def test_rank_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        rank(**{"losses": GOLDEN, **options})


def test_registered_rankings_are_documented():
    rows = {row["name"]: row for row in RANKINGS.table()}
    assert list(rows) == ["raw", "pmi", "centered", "minmax", "zscore"]
    assert all(row["formula"].startswith("r = ") and row["summary"] for row in rows.values())


def test_recall_and_precision_by_their_definitions():
    """Several right items; every order of four scores, against loops over ranks and scikit-learn."""
    right = np.array([True, False, True, False])
    for order in itertools.permutations([0.1, 0.2, 0.3, 0.4]):
        ranked = [right[i] for i in np.argsort(order)]
        for k in (1, 2, 3, 4, 9):
            found = recall_at([order], [right], k)
            assert found.tolist() == [float(any(ranked[:k]))]
            hits = [sum(ranked[: i + 1]) / (i + 1) for i in range(min(k, 4)) if ranked[i]]
            assert average_precision_at([order], [right], k)[0] == pytest.approx(sum(hits) / min(k, 2))
        full = average_precision_score(right, -np.array(order))
        assert average_precision_at([order], [right], 4)[0] == pytest.approx(full)


def test_ties_are_broken_against_the_ranking():
    scores, right = [[1.0, 1.0, 1.0, 2.0]], np.array([[True, False, False, False]])
    assert [recall_at(scores, right, k)[0] for k in (1, 2, 3)] == [0, 0, 1]
    assert average_precision_at(scores, right, 3)[0] == pytest.approx(1 / 3)
    assert recall_at(np.zeros((5, 5)), np.eye(5, dtype=bool)).sum() == 0, "a ranking that says nothing finds nothing"


@pytest.mark.parametrize(
    ("scores", "right", "k", "message"),
    [
        ([[1.0, 2.0]], [[False, False]], 1, "query 0 has no right item"),
        ([[1.0, 2.0]], [[True]], 1, "right of bool"),
        ([[1.0, 2.0]], [[1, 0]], 1, "right of bool"),
        ([[1.0, np.inf]], [[True, False]], 1, "not finite"),
        ([[1.0, 2.0]], [[True, False]], 0, "k is 0"),
    ],
)
def test_measures_refuse(scores, right, k, message):
    for measure in (recall_at, average_precision_at):
        with pytest.raises(ValueError, match=message):
            measure(scores, right, k)


def test_intervals_cover_the_mean():
    """About 95 of 100 samples of known mean; deterministic for a seed; a constant has no width."""
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        found = interval(rng.random(60) < 0.3, resamples=300)
        covered += found.low <= 0.3 <= found.high
    assert 85 <= covered <= 100
    assert interval([1, 0, 1], seed=4) == interval([1, 0, 1], seed=4)
    flat = interval([0.5] * 8)
    assert (flat.value, flat.low, flat.high) == (0.5, 0.5, 0.5)
    weighted = interval([2.0, 2.0, 2.0], [1, 2, 3])
    assert weighted.value == weighted.low == weighted.high == 2.0
    for values, options, message in [
        ([], {}, "values has shape"),
        ([np.nan], {}, "finite"),
        ([1.0], {"weights": [1, 2]}, "weights"),
        ([1.0], {"level": 1.0}, "level is 1.0"),
        ([1.0], {"resamples": 0}, "resamples is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            interval(values, **options)


def test_information_by_hand():
    """Two texts of 2 and 6 tokens: 8 and 12 nats alone, 4 and 12 with their contexts, 9 and 13 with the other's."""
    found = informed([4, 12], [9, 13], [8, 12], [2, 6])
    assert found.contexts.alone == 20 / 8
    assert found.contexts.given == 16 / 8
    assert found.contexts.mutual.value == pytest.approx(0.5)
    assert found.contexts.share == pytest.approx(0.2)
    assert found.shuffled.mutual.value == pytest.approx(-0.25)
    assert found.difference.value == pytest.approx(0.75)
    assert str(found.contexts).startswith("2.000 nats per token, 2.500 without; information 0.500 [")
    assert found.contexts.mutual.low == 0, "a resample of the second text alone"
    assert found.contexts.mutual.high == 2
    with pytest.raises(ValueError, match=r"alone \(2,\)"):
        infogain([1], [1, 2], [1])


@pytest.mark.parametrize("count", [2, 3, 10])
def test_others_have_no_fixed_point(count):
    for seed in range(20):
        order = others(count, seed)
        assert sorted(order) == list(range(count))
        assert (order != np.arange(count)).all()
    with pytest.raises(ValueError, match="count is 1"):
        others(1)

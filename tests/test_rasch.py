"""Rasch models: golden categories, derivatives, dense references of all methods, recovery, links, and refusals."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.special import log_softmax
from scipy.stats import norm

from hf_xent import rasch
from hf_xent.rasch import marginal, modal
from hf_xent.rasch.cells import read
from hf_xent.rasch.moments import moments, threshold_gradient

TAU = np.array([-1.0, 0.0, 1.0])


def simulated(seed, units=60, items=4, raters=4, per_unit=2, tau=TAU, sd=1.2):
    """Scores of units by some of the raters each, and what they were drawn from."""
    draw = np.random.default_rng(seed)
    delta, alpha = np.linspace(-0.9, 0.9, items), np.linspace(-0.8, 0.8, raters)
    theta = draw.normal(0.3, sd, units)
    chosen = np.stack([draw.choice(raters, per_unit, replace=False) for _ in range(units)])
    unit, item = np.repeat(np.arange(units), per_unit * items), np.tile(np.arange(items), units * per_unit)
    rater = np.repeat(chosen.ravel(), items)
    p = rasch.probabilities(theta[unit] - delta[item] - alpha[rater], tau)
    score = (p.cumsum(-1) < draw.random(len(unit))[:, None]).sum(-1)
    frame = {"unit": unit.tolist(), "item": item.tolist(), "rater": rater.tolist(), "score": score.tolist()}
    return frame, {"theta": theta, "item": delta, "rater": alpha, "tau": tau}


def in_order(facet):
    """Severities by the levels' names."""
    return facet.severity[np.argsort(facet.names)]


@pytest.fixture(scope="module")
def frame():
    return simulated(0)[0]


@pytest.fixture(scope="module")
def fitted(frame):
    """Method -> its measure of the same scores."""
    return {
        method: rasch.fit(frame, rater="rater", method=method, extremes="drop")
        for method in ("joint", "map", "marginal")
    }


@pytest.mark.parametrize(
    ("eta", "p", "mean", "variance"),
    [
        (0, [0.134471, 0.365529, 0.365529, 0.134471], 1.5, 0.787883),
        (1, [0.020593, 0.152163, 0.413622, 0.413622], 2.220273, 0.599637),
        (-0.5, [0.258274, 0.425822, 0.258274, 0.057629], 1.115258, 0.733780),
    ],
)
def test_golden_categories(eta, p, mean, variance):
    np.testing.assert_allclose(rasch.probabilities(eta, TAU), p, atol=5e-7)
    assert rasch.expected(eta, TAU) == pytest.approx(mean, abs=5e-7)
    assert rasch.variance(eta, TAU) == pytest.approx(variance, abs=5e-7)


def test_neighbours_have_the_log_odds_of_the_formula():
    """Far from 0, too, and the counts of a large draw are those that the formula expects."""
    tau = np.array([0.7, -1.2, 2.0, -1.5])
    for eta in (-300.0, -2.0, 0.4, 300.0):
        logs = np.log(rasch.probabilities(eta, tau).clip(1e-300))
        seen = logs[:-1] > -600
        np.testing.assert_allclose(np.diff(logs)[seen & (logs[1:] > -600)], (eta - tau)[seen & (logs[1:] > -600)])
    drawn, truth = simulated(3, units=3000, sd=0.5)
    eta = truth["theta"][drawn["unit"]] - truth["item"][drawn["item"]] - truth["rater"][drawn["rater"]]
    p = np.exp(log_softmax(np.arange(4) * eta[:, None] - [0, -1, -1, 0], -1))
    counts, error = np.bincount(drawn["score"]), np.sqrt((p * (1 - p)).sum(0))
    assert (np.abs(counts - p.sum(0)) < 4 * error).all()


def dense(cells, theta, free):
    """Sum of log P by loops over parameters as they are written, for finite differences."""
    names = list(cells.facets)
    severities, start = {}, 0
    for name in names:
        width = len(cells.facets[name].names) - 1
        own = free[start : start + width]
        severities[name], start = np.append(own, -own.sum()), start + width
    eta = theta[cells.unit.codes] - sum(severities[name][cells.facets[name].codes] for name in names)
    total = 0.0
    tables, places = [], start
    for size in cells.sizes:
        tables.append([0.0, *free[places : places + size - 2], 0.0])
        places += size - 2
    for o, x in enumerate(cells.score):
        sums = np.array(tables[cells.group[o]])
        total += log_softmax(np.arange(len(sums)) * eta[o] - sums)[x]
    return total


@pytest.mark.parametrize("model", ["rating", "partial"])
def test_derivatives_are_those_of_the_likelihood(model):
    """Gradients and Hessian of the cells' likelihood by finite differences, with items of unlike numbers of levels."""
    frame, _ = simulated(1, units=6)
    scores = [min(x, 2) if i == 0 else x for x, i in zip(frame["score"], frame["item"], strict=True)]
    columns = {"unit": "unit", "item": "item", "rater": "rater", "score": "score"}
    cells = read({**frame, "score": scores}, columns, (), model == "partial")
    draw = np.random.default_rng(0)
    theta, free = draw.normal(size=6), draw.normal(size=sum(cells.counts)) / 2

    def gradient(x):
        at = modal.moments_at(cells, x[:6], x[6:])
        one = np.ones(len(at.error))
        by_free = [cells.design.T @ at.error, threshold_gradient(cells, at, one)]
        return np.concatenate([cells.by_unit(at.error), *by_free])

    x, steps = np.concatenate([theta, free]), np.eye(6 + len(free)) * 1e-5
    slopes = [(dense(cells, *np.split(x + s, [6])) - dense(cells, *np.split(x - s, [6]))) / 2e-5 for s in steps]
    np.testing.assert_allclose(gradient(x), slopes, rtol=1e-6, atol=1e-6)
    curves = -np.stack([(gradient(x + s) - gradient(x - s)) / 2e-5 for s in steps])
    own, cross, both = modal._second(cells, modal.moments_at(cells, theta, free), 0.0)
    found = np.block([[np.diag(own), cross.toarray()], [cross.toarray().T, both]])
    np.testing.assert_allclose(found, curves, rtol=1e-5, atol=1e-6)


def test_joint_and_map_are_where_a_general_optimizer_ends(frame, fitted):
    cells, units = fitted["map"].cells, len(fitted["map"].units)
    mean, precision = fitted["map"].mean, fitted["map"].sd ** -2
    start = np.zeros(units + sum(cells.counts))

    def objective(x):
        theta, free = x[:units], x[units:]
        at = modal.moments_at(cells, theta, free)
        gradient = [
            cells.by_unit(at.error) - precision * (theta - mean),
            cells.design.T @ at.error,
            threshold_gradient(cells, at, np.ones(len(at.error))),
        ]
        return precision * ((theta - mean) ** 2).sum() / 2 - at.log_p.sum(), -np.concatenate(gradient)

    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-15}).x
    np.testing.assert_allclose(fitted["map"].theta, found[:units], atol=2e-3)
    np.testing.assert_allclose(fitted["map"].items.severity, cells.severities(found[units:])["item"], atol=1e-3)
    at = modal.moments_at(cells, fitted["map"].theta, found[units:])
    np.testing.assert_allclose(fitted["map"].se, 1 / np.sqrt(cells.by_unit(at.variance) + precision), rtol=1e-3)
    assert mean == pytest.approx(fitted["map"].theta.mean(), abs=1e-3)
    spread = (fitted["map"].theta - mean) ** 2 + fitted["map"].se ** 2
    assert fitted["map"].sd ** 2 == pytest.approx(spread.mean(), rel=1e-3)


def test_marginal_likelihood_against_adaptive_integration(fitted):
    """scipy's quad for every unit; posterior means and deviations, too; and the maximum is one."""
    measure, cells = fitted["marginal"], fitted["marginal"].cells
    severities = {name: facet.severity for name, facet in measure.facets.items()}
    sums = np.concatenate([[0], np.cumsum(measure.thresholds)])

    def density(theta, unit):
        rows = cells.unit.codes == unit
        eta = theta - sum(severities[name][column.codes[rows]] for name, column in cells.facets.items())
        logs = log_softmax(np.arange(4) * eta[:, None] - sums, -1)[np.arange(rows.sum()), cells.score[rows]]
        return np.exp(logs.sum() + norm.logpdf(theta, measure.mean, measure.sd) + 10)

    total = 0.0
    for unit in range(0, 60, 6):
        mass, first, second = (
            quad(lambda t, k=k, unit=unit: t**k * density(t, unit), -8, 8, points=[measure.theta[unit]], epsabs=1e-14)[
                0
            ]
            for k in range(3)
        )
        assert first / mass == pytest.approx(measure.theta[unit], abs=1e-6)
        assert np.sqrt(second / mass - (first / mass) ** 2) == pytest.approx(measure.se[unit], abs=1e-6)
        total += np.log(mass) - 10
    x = np.concatenate([_free(measure), [measure.mean, np.log(measure.sd)]])
    nodes, _ = marginal.posterior(cells, x, measure.theta, 21)
    some = cells.where(np.isin(cells.unit.codes, range(0, 60, 6)))
    part, _ = marginal.posterior(some, _reordered(some, measure), measure.theta[::6], 21)
    assert part.log_likelihood == pytest.approx(total, abs=1e-6)
    assert nodes.log_likelihood == pytest.approx(measure.log_likelihood, abs=1e-8)

    def at(y):
        return marginal.posterior(cells, y, measure.theta, 21)[0]

    steps = np.eye(len(x)) * 1e-4
    gradient, complete, lost = marginal.derivatives(cells, x + 0.05, at(x + 0.05))
    y = x + 0.05
    slopes = [(at(y + s).log_likelihood - at(y - s).log_likelihood) / 2e-4 for s in steps]
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-5)
    curves = [
        (marginal.derivatives(cells, y + s, at(y + s))[0] - marginal.derivatives(cells, y - s, at(y - s))[0]) / 2e-4
        for s in steps
    ]
    np.testing.assert_allclose(complete - lost, -np.stack(curves), rtol=1e-4, atol=1e-4)
    assert np.abs(marginal.derivatives(cells, x, at(x))[0]).max() < 1e-4


def _free(measure):
    """Free parameters of a measure: all levels but the last, and T_1 .. T_(K-2)."""
    return np.concatenate([*(f.severity[:-1] for f in measure.facets.values()), np.cumsum(measure.thresholds)[:-1]])


def _reordered(cells, measure):
    """The parameters of a measure for other cells of the same levels, in whose order levels may be others."""
    parts = []
    for name, facet in measure.facets.items():
        by_name = dict(zip(facet.names, facet.severity, strict=True))
        parts.append([by_name[level] for level in cells.facets[name].names[:-1]])
    return np.concatenate([*parts, np.cumsum(measure.thresholds)[:-1], [measure.mean, np.log(measure.sd)]])


def test_one_rater_and_one_item_are_an_adjacent_category_model():
    """Three units with many scores each: multinomial logits k eta_n - T_k, fitted without this package."""
    draw = np.random.default_rng(4)
    counts = np.array([[30, 22, 9, 4], [12, 25, 20, 10], [3, 12, 25, 33]])
    scores = [[k] * c for row in counts for k, c in enumerate(row)]
    frame = {"unit": np.repeat(list("abc"), counts.sum(1)).tolist(), "item": ["i"] * int(counts.sum())}
    frame["score"] = [x for part in scores for x in part]
    order = draw.permutation(len(frame["score"]))
    frame = {name: [column[i] for i in order] for name, column in frame.items()}
    measure = rasch.fit(frame, method="joint")

    def loss(x):
        logits = np.arange(4) * x[:3, None] - np.array([0, x[3], x[4], 0])
        return -(counts * log_softmax(logits, -1)).sum()

    found = minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-7})
    places = dict(zip(measure.units, measure.theta, strict=True))
    np.testing.assert_allclose([places[u] for u in "abc"], found.x[:3], atol=1e-4)
    np.testing.assert_allclose(np.cumsum(measure.thresholds), [*found.x[3:], 0], atol=1e-4)
    assert measure.log_likelihood == pytest.approx(-found.fun, abs=1e-6)
    assert measure.items.severity.tolist() == [0.0]
    h = np.eye(5) * 1e-3
    curves = [
        [
            (loss(found.x + a + b) - loss(found.x + a - b) - loss(found.x - a + b) + loss(found.x - a - b)) / 4e-6
            for a in h
        ]
        for b in h
    ]
    inverse = np.linalg.inv(curves)
    assert measure.thresholds_se[0] == pytest.approx(np.sqrt(inverse[3, 3]), rel=1e-3)
    middle = inverse[3, 3] + inverse[4, 4] - 2 * inverse[3, 4]  # tau_2 = T_2 - T_1
    assert measure.thresholds_se[1] == pytest.approx(np.sqrt(middle), rel=1e-3)


def test_partial_credit_has_thresholds_of_each_item(frame):
    """Items of unlike numbers of categories and unlike lowest scores; with one item it is the rating model."""
    scores = [min(x, 2) + 5 if i == 0 else x for x, i in zip(frame["score"], frame["item"], strict=True)]
    measure = rasch.fit({**frame, "score": scores}, rater="rater", model="partial")
    item = measure.items.names.index(0)
    assert measure.thresholds.shape == (4, 3) and np.isnan(measure.thresholds[item, 2])
    np.testing.assert_allclose(np.nansum(measure.thresholds, 1), 0, atol=1e-12)
    assert measure.probabilities()[measure.cells.item.codes == item, 3].max() == 0
    expected = measure.expected()[measure.cells.item.codes == item]
    assert expected.min() > 5 and expected.max() < 7
    raw = np.array(scores)[np.array(frame["item"]) == 0]
    assert expected.mean() == pytest.approx(raw.mean(), abs=0.05)
    one = {name: [v for v, i in zip(column, frame["item"], strict=True) if i == 1] for name, column in frame.items()}
    rating, partial = (rasch.fit(one, rater="rater", model=model) for model in ("rating", "partial"))
    np.testing.assert_allclose(partial.theta, rating.theta, atol=1e-8)
    np.testing.assert_allclose(partial.thresholds[0], rating.thresholds, atol=1e-8)


def test_names_and_order_of_rows_change_names_alone(frame, fitted):
    """Raters permuted permute severities; so do rows, items, and the type of columns."""
    new = [10, 12, 13, 11]
    order = np.random.default_rng(1).permutation(len(frame["score"]))
    rows = [
        {
            "text": f"t{frame['unit'][o]}",
            "q": frame["item"][o],
            "by": new[frame["rater"][o]],
            "s": str(frame["score"][o]),
        }
        for o in order
    ]
    for method, measure in fitted.items():
        again = rasch.fit(rows, "text", "q", "by", "s", method=method, extremes="drop")
        np.testing.assert_allclose(in_order(again.raters)[[0, 2, 3, 1]], in_order(measure.raters), atol=1e-5)
        np.testing.assert_allclose(in_order(again.items), in_order(measure.items), atol=1e-5)
        places = dict(zip(again.units, again.theta, strict=True))
        np.testing.assert_allclose([places[f"t{u}"] for u in measure.units], measure.theta, atol=1e-4)
        for facet in measure.facets.values():
            assert abs(facet.severity.sum()) < 1e-9


def test_a_constant_added_to_all_places_is_taken_up_by_what_is_centred(frame):
    """theta + c and delta + c have the same likelihood, so only their difference is in the data; sums are 0."""
    cells = rasch.fit(frame, rater="rater").cells
    draw = np.random.default_rng(0)
    theta, delta = draw.normal(size=60), draw.normal(size=4)
    sums = np.array([[0, -1.0, -1.0, 0]])
    one, other = (
        moments(cells, (theta + c)[cells.unit.codes] - (delta + c)[cells.item.codes], sums).log_p for c in (0, 2.5)
    )
    np.testing.assert_allclose(one, other, atol=1e-12)
    joint = rasch.fit(frame, rater="rater", method="joint", extremes="drop")
    shifted = rasch.fit(
        {**frame, "score": [x + 7 for x in frame["score"]]}, rater="rater", method="joint", extremes="drop"
    )
    np.testing.assert_allclose(shifted.theta, joint.theta)
    assert shifted.cells.lowest.tolist() == [7]


def test_further_facets(frame):
    """Every rater asks in two formats, of which one is stricter by a category's worth."""
    strict = [o % 3 == 0 for o in range(len(frame["score"]))]
    scores = [max(x - 1, 0) if s else x for x, s in zip(frame["score"], strict, strict=True)]
    frame = {**frame, "score": scores, "format": ["strict" if s else "plain" for s in strict]}
    measure = rasch.fit(frame, rater="rater", facets=["format"])
    found = dict(zip(measure.facets["format"].names, measure.facets["format"].severity, strict=True))
    assert found["strict"] == -found["plain"] > 0.5
    assert [row["name"] for row in measure.facets["format"].rows()] == ["strict", "plain"]


def test_missing_scores_are_left_out(frame):
    gaps = [None if o % 7 == 0 else float("nan") if o % 7 == 1 else x for o, x in enumerate(frame["score"])]
    kept = [o % 7 > 1 for o in range(len(gaps))]
    less = {name: [v for v, keep in zip(column, kept, strict=True) if keep] for name, column in frame.items()}
    one, other = rasch.fit({**frame, "score": gaps}, rater="rater"), rasch.fit(less, rater="rater")
    assert one.units == other.units and one.theta.tolist() == other.theta.tolist()


def test_other_cells_have_expectations(frame, fitted):
    """Those of the fit are the fit's own, in any order; a new unit or level has none."""
    for model in ("rating", "partial"):
        measure = rasch.fit({**frame, "score": [x + 2 for x in frame["score"]]}, rater="rater", model=model)
        back = {name: column[::-1] for name, column in frame.items()}
        np.testing.assert_allclose(measure.expected(back), measure.expected()[::-1], atol=1e-12)
        np.testing.assert_allclose(measure.probabilities(back), measure.probabilities()[::-1], atol=1e-12)
        cell = {"unit": [3], "item": [2], "rater": [1]}
        places = {name: facet.severity[facet.names.index(cell[name][0])] for name, facet in measure.facets.items()}
        tau = measure.thresholds if model == "rating" else measure.thresholds[measure.items.names.index(2)]
        eta = measure.theta[measure.units.index(3)] - sum(places.values())
        assert measure.expected(cell)[0] == pytest.approx(2 + float(rasch.expected(eta, tau)))
    with pytest.raises(ValueError, match="'rater' has 9, which was not fitted"):
        fitted["map"].expected({**cell, "rater": [9]})


def test_tables_become_one_score_a_row():
    table = {"who": ["x", "y"], "a": [1, 2], "b": ["NA", 3]}
    found = rasch.stack(table, ["a", "b"], keep=["who"])
    assert found == {"unit": [0, 0, 1, 1], "who": [*"xxyy"], "item": [*"abab"], "score": [1, "NA", 2, 3]}
    assert rasch.stack(table, ["a"], unit="who") == {"who": ["x", "y"], "item": ["a", "a"], "score": [1, 2]}
    with pytest.raises(ValueError, match="items is 'c': choose a column of the frame, who, a, b"):
        rasch.stack(table, ["c"])


def extreme_frame():
    """Unit 0 has only highest scores, unit 1 only lowest ones."""
    frame, _ = simulated(5)
    ends = {0: 3, 1: 0}
    return {**frame, "score": [ends.get(u, x) for u, x in zip(frame["unit"], frame["score"], strict=True)]}


def test_extreme_units_are_finite_but_for_joint():
    frame = extreme_frame()
    for method in ("map", "marginal"):
        measure = rasch.fit(frame, rater="rater", method=method)
        assert np.isfinite(measure.theta).all() and not measure.dropped
        assert measure.theta[0] == measure.theta.max() and measure.theta[1] == measure.theta.min()
    with pytest.raises(
        ValueError, match=r"'units' has \d whose scores all are .* \(0, 1.*\), .*choose extremes='drop'"
    ):
        rasch.fit(frame, rater="rater", method="joint")
    joint = rasch.fit(frame, rater="rater", method="joint", extremes="drop")
    assert joint.theta[:2].tolist() == [np.inf, -np.inf] and {0, 1} <= set(joint.dropped["units"])
    assert joint.se[0] == np.inf and np.isfinite(joint.theta).sum() == 60 - len(joint.dropped["units"])
    assert np.isfinite(joint.reliability)


def test_units_that_do_not_differ(frame):
    """Answers drawn for each item alone, with less spread over units than chance: nothing is measured."""
    draw = np.random.default_rng(0)
    halves = [draw.permutation([x, 3 - x, x, 3 - x]) for x in draw.integers(0, 4, 120)]
    scores = [int(x) for half in halves for x in half]
    measure = rasch.fit({**frame, "score": scores}, rater="rater")
    assert measure.sd == pytest.approx(0.001, abs=1e-4) and abs(measure.reliability) < 0.01
    assert np.ptp(measure.theta) < 1e-3 and np.isfinite(measure.items.se).all()


def test_constant_raters_are_refused_or_dropped(frame):
    scores = [0 if r == 2 else x for r, x in zip(frame["rater"], frame["score"], strict=True)]
    with pytest.raises(ValueError, match=r"'rater' has 1 whose scores all are .* \(2\)"):
        rasch.fit({**frame, "score": scores}, rater="rater")
    measure = rasch.fit({**frame, "score": scores}, rater="rater", extremes="drop")
    assert measure.dropped == {"rater": (2,)} and 2 not in measure.raters.names
    assert len(measure.units) == 60


def test_what_cannot_be_compared_is_refused(frame):
    """Raters 0 and 1 have even units alone, 2 and 3 odd ones; or a rater has an item of its own."""
    rater = [(r % 2) + 2 * (u % 2) for r, u in zip(frame["rater"], frame["unit"], strict=True)]
    with pytest.raises(ValueError, match=r"'rater' falls into 2 groups that share no unit \((0, 1|1, 0|2, 3|3, 2); "):
        rasch.fit({**frame, "rater": rater}, rater="rater")
    with pytest.raises(ValueError, match="levels of 'item' and 'rater' change together"):
        rasch.fit({**frame, "rater": frame["item"]}, rater="rater")


def test_raters_that_do_not_follow_the_model_are_found():
    """One of eight raters draws scores at random: its infit is beyond 1.5, and without it raters fit."""
    frame, truth = simulated(8, units=150, raters=8, per_unit=4, items=3)
    noise = np.random.default_rng(0).integers(0, 4, len(frame["score"]))
    scores = [
        int(noise[o]) if r == 5 else x for o, (r, x) in enumerate(zip(frame["rater"], frame["score"], strict=True))
    ]
    measure = rasch.fit({**frame, "score": scores}, rater="rater")
    assert measure.raters.misfits(0.5, 1.5) == [5]
    cleaned = rasch.drop_misfits(measure)
    assert cleaned.dropped == {"rater": (5,)} and 5 not in cleaned.raters.names
    assert rasch.drop_misfits(cleaned) is cleaned
    theta = truth["theta"][list(cleaned.units)]
    before = dict(zip(measure.units, measure.theta, strict=True))
    assert np.corrcoef(cleaned.theta, theta)[0, 1] > np.corrcoef([before[u] for u in cleaned.units], theta)[0, 1]
    error = np.array(scores) - measure.expected()
    rows = np.array(frame["rater"]) == 5
    p = measure.probabilities()[rows]
    v = (p * np.arange(4) ** 2).sum(1) - (p @ np.arange(4)) ** 2
    place = measure.raters.names.index(5)
    assert measure.raters.infit[place] == pytest.approx((error[rows] ** 2).sum() / v.sum())
    assert measure.raters.outfit[place] == pytest.approx((error[rows] ** 2 / v).mean())
    with pytest.raises(ValueError, match="fewer than two of 'rater'"):
        rasch.drop_misfits(measure, infit=(0.999999, 1.000001))
    with pytest.raises(ValueError, match="facet is 'judge': choose one of item, rater"):
        rasch.drop_misfits(measure, "judge")


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"score": [0.5] * 480}, {}, "has 0.5: pass ordered categories as whole numbers"),
        ({"score": ["good"] * 480}, {}, "pass ordered categories as whole numbers"),
        ({"score": [None] * 480}, {}, "a column without any score"),
        ({"score": [2] * 480}, {}, "score has the score 2 alone"),
        ({"score": [0, 2] * 240}, {}, "score goes from 0 to 2, but 1 was never given"),
        ({"rater": [None] * 480}, {}, "'rater' has no value beside some scores"),
        ({}, {"item": "question"}, "item is 'question': choose a column of the frame, unit, item, rater, score"),
        ({}, {"facets": ["item"]}, "'item' is named twice"),
        ({}, {"facets": "item"}, "facets is 'item': pass a list"),
        ({}, {"model": "graded"}, "model is 'graded': choose one of rating, partial"),
        ({}, {"method": "bayes"}, "method is 'bayes': choose one of marginal, map, joint"),
        ({}, {"correct": True}, "correct is True, but method is 'marginal'"),
        ({}, {"method": "map", "nodes": 9}, "nodes is 9, but method is 'map'"),
        ({}, {"nodes": 2}, "nodes is 2: choose a whole number of at least 3"),
        ({}, {"tau": 1}, "tau is no option of fit: choose among model, method"),
    ],
)
def test_refusals(frame, changes, options, message):
    with pytest.raises(ValueError, match=message):
        rasch.fit({**frame, **changes}, **{"rater": "rater", **options})


def test_a_measure_without_raters_has_none(frame):
    measure = rasch.fit(frame)
    assert list(measure.facets) == ["item"] and 0 < measure.reliability < 1
    with pytest.raises(ValueError, match="rater is None"):
        _ = measure.raters


@pytest.mark.slow
def test_intervals_cover_what_scores_were_drawn_from():
    """50 draws. Decided before: 'marginal' has at least 90 % of items, raters and thresholds in their 95 % intervals.

    'joint' stretches thresholds and 'map' shrinks them; the correction takes most of the stretch away.
    """
    settings = {
        "marginal": {},
        "map": {},
        "joint": {"extremes": "drop"},
        "corrected": {"extremes": "drop", "correct": True},
    }
    inside, slopes = {name: [] for name in settings}, {name: [] for name in settings}
    for seed in range(50):
        frame, truth = simulated(100 + seed, units=80)
        for name, options in settings.items():
            method = "joint" if name == "corrected" else name
            measure = rasch.fit(frame, rater="rater", method=method, **options)
            for facet in ("item", "rater"):
                order = np.argsort(measure.facets[facet].names)
                gap = np.abs(measure.facets[facet].severity[order] - truth[facet])
                inside[name] += (gap < 1.96 * measure.facets[facet].se[order]).tolist()
            inside[name] += (np.abs(measure.thresholds - TAU) < 1.96 * measure.thresholds_se).tolist()
            slopes[name].append(measure.thresholds @ TAU / 2)
    covered = {name: np.mean(values) for name, values in inside.items()}
    slope = {name: np.mean(values) for name, values in slopes.items()}
    error = {name: np.std(values) / 50**0.5 for name, values in slopes.items()}
    assert covered["marginal"] >= 0.9 > max(covered["joint"], covered["map"])
    assert abs(slope["marginal"] - 1) < 3 * error["marginal"]
    assert slope["joint"] - 1 > 3 * error["joint"] and 1 - slope["map"] > 3 * error["map"]
    assert abs(slope["corrected"] - 1) < slope["joint"] - 1


@pytest.mark.slow
def test_scale_items_compares_all_arms(tmp_path, monkeypatch):
    """Answers of made-up people to two levels of items, some of which are turned: turning them back helps."""
    examples = Path(__file__).parents[1] / "examples"
    monkeypatch.syspath_prepend(str(examples))
    from hf_xent.data.bfi import ITEMS

    example = runpy.run_path(str(examples / "scale_items.py"))
    draw = np.random.default_rng(0)
    tau = np.linspace(-1.5, 1.5, 5)
    lines = [",".join(ITEMS)]
    for theta in draw.normal(0, 1.5, (100, 5)):
        p = rasch.probabilities(np.repeat(theta, 5), tau)
        answers = 1 + (p.cumsum(1) < draw.random((25, 1))).sum(1)
        turned = [7 - x if item in example["TURNED"] else x for item, x in zip(ITEMS, answers, strict=True)]
        lines.append(",".join("NA" if draw.random() < 0.02 else str(x) for x in turned))
    (tmp_path / "bfi.csv").write_text("\n".join(lines))
    monkeypatch.setitem(example["main"].__globals__, "PEOPLE", 100)
    monkeypatch.setattr(example["class_losses"], "main", lambda *arguments: arguments)
    found = example["main"](tmp_path / "bfi.csv", seeds=1, output=tmp_path / "out")
    assert found["answers"] == (f"bfi:N1@{tmp_path / 'bfi.csv'}", 1, tmp_path / "out")
    nll = {arm: rows[0]["NLL"] for arm, rows in found["scales"].items()}
    assert set(nll) == set(example["ARMS"])
    assert max(nll["rating scale"], nll["partial credit"]) < nll["partial credit, not turned"] < nll["shares"] + 0.3
    reliability = {arm: rows[0]["reliability"] for arm, rows in found["scales"].items() if arm != "shares"}
    assert reliability["partial credit, not turned"] < 0.5 < reliability["partial credit"]

"""Fits of laws: known parameters are found again, published curves are forecast, what cannot be known is refused."""

import numpy as np
import pytest
from scipy.optimize import minimize

from hf_xent import laws
from hf_xent.laws import LAWS, Curve, Fit, fit
from hf_xent.laws.base import Law
from hf_xent.laws.curves import parts_of
from hf_xent.laws.fitting import Problem
from support.published_curves import published, schedule

SIZES, TOKENS = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e6, 1e9, 6), np.geomspace(1e8, 1e11, 6)))
ALONG = np.geomspace(1e6, 1e10, 36)
GENERATED = {  # law -> its parameters, the columns of made-up data, and those of a forecast
    "power": ({"floor": 1.5, "x0": 2e7, "alpha": 0.3}, {"x": ALONG}, {"x": 4e10}),
    "parametric": (
        {"E": 1.82, "A": 482, "alpha": 0.348, "B": 2085, "beta": 0.366},
        {"params": SIZES, "tokens": TOKENS},
        {"params": 4e9, "tokens": 4e11},
    ),
    "encoder_decoder": (
        {"alpha": 2, "pe": 0.15, "pd": 0.25, "floor": 1.1},
        {"encoder": SIZES, "decoder": TOKENS / 100},
        {"encoder": 4e9, "decoder": 4e9},
    ),
    "downstream": ({"E": 1.2, "A": 60, "alpha": 0.3}, {"tokens": ALONG}, {"tokens": 4e10}),
    "log": ({"A": 0.03, "alpha": 0.35, "beta": 1.2}, {"tokens": ALONG}, {"tokens": 4e10}),
}
OF_SCHEDULES = {
    "annealing": {"L0": 2.7, "A": 0.5, "alpha": 0.5, "C": 0.5},
    "multi_power": {"L0": 2.6, "A": 0.6, "alpha": 0.45, "B": 400, "C": 1.0, "beta": 0.5, "gamma": 0.5},
}
UNSEEN = ("wsd_20000_24000", "wsdld_20000_24000", "wsdcon_3", "wsdcon_9", "wsdcon_18")


def noise(rows, seed):
    """0.2 % of noise on a loss, [rows]."""
    return np.exp(0.002 * np.random.default_rng(seed).standard_normal(rows))


def generated(name, seed=None):
    """A law, columns and made-up losses, exact without a seed."""
    parameters, columns, far = GENERATED[name]
    law = LAWS[name](**parameters)
    y = law.predict(**columns)
    return law, columns, y if seed is None else y * noise(len(y), seed), far


def rates(kind, steps=2000, warmup=100):
    """A schedule with a warm-up, [steps]."""
    i = np.arange(1, steps + 1)
    share = np.clip((i - warmup) / (steps - warmup), 0, 1)
    after = {
        "constant": np.ones(steps),
        "cosine": 0.55 + 0.45 * np.cos(np.pi * share),
        "sudden": np.where(i > steps // 2, 0.3, 1.0),
        "wsd": np.clip((steps - i) / (steps / 4), 0.1, 1),
    }[kind]
    return 3e-4 * np.minimum(1, i / warmup) * after


def run(law, kind, seed=None, **more):
    """A made-up curve."""
    lr, step = rates(kind), np.arange(200, 2001, 20)
    loss = law.predict(lr=lr, step=step, **more)
    loss = loss if seed is None else loss * noise(len(step), seed)
    return Curve(lr, step, loss, name=kind, **more)


def test_every_law_is_fitted_here():
    assert {*GENERATED, *OF_SCHEDULES} == {*LAWS}


@pytest.mark.parametrize("name", GENERATED)
def test_exact_losses_give_the_parameters_back(name):
    law, columns, y, _ = generated(name)
    found = fit(name, columns, y)
    assert found.law.values == pytest.approx(law.values, rel=1e-4)
    assert found.objective < 1e-12
    assert np.abs(found.residuals).max() < 1e-6


@pytest.mark.parametrize("name", OF_SCHEDULES)
def test_exact_curves_give_the_parameters_back(name):
    law = LAWS[name](**OF_SCHEDULES[name])
    found = fit(name, [run(law, kind) for kind in ("constant", "cosine", "sudden")])
    assert found.law.values == pytest.approx(law.values, rel=1e-3)
    assert found.error_on(run(law, "wsd")).worst < 1e-3


def test_curves_of_three_sizes_give_the_term_of_the_size():
    law = laws.AnnealingLaw(2.2, 0.5, 0.5, 0.5, 60.0, 0.3, by_size=True)
    curves = [run(law, kind, params=size) for size in (1e5, 1e6, 1e7) for kind in ("constant", "cosine")]
    assert fit("annealing:by_size=True", curves).law.values == pytest.approx(law.values, rel=1e-3)
    with pytest.raises(ValueError, match="params has 2 distinct values: AnnealingLaw is determined by 3"):
        fit("annealing:by_size=True", curves[:4])


def test_the_parametric_loss_reads_tokens_and_sizes_of_curves():
    law, step = laws.ParametricLoss(E=1.8, A=480, alpha=0.35, B=2000, beta=0.37), np.arange(50, 501, 50)
    curves = [
        Curve(np.full(500, 0.1), step, law.predict(params=size, tokens=step * 1e6), params=size, tokens=step * 1e6)
        for size in (1e6, 1e7, 1e8)
    ]
    assert fit("parametric", curves).law.values == pytest.approx(law.values, rel=1e-3)


@pytest.mark.parametrize("name", GENERATED)
def test_forecasts_from_noisy_losses(name):
    law, columns, y, far = generated(name, seed=0)
    found = fit(name, columns, y, bootstrap=30)
    forecast, truth = found.predict(**far), law.predict(**far)
    assert forecast.loss == pytest.approx(truth, rel=0.01)
    assert forecast.low < forecast.loss < forecast.high
    assert all(low < found.law.values[name] < high for name, (low, high) in found.intervals.items())


@pytest.mark.slow  # 50 fits with 100 refits each, for three laws
@pytest.mark.parametrize("name", ["power", "parametric", "annealing"])
def test_intervals_hold_the_truth_in_nine_of_ten_draws(name):
    inside = []
    for seed in range(50):
        if name == "annealing":
            law = LAWS[name](**OF_SCHEDULES[name])
            found = fit(name, [run(law, "constant", seed), run(law, "cosine", 1000 + seed)], bootstrap=100, seed=seed)
            assert found.error_on(run(law, "wsd")).worst < 1
        else:
            law, columns, y, far = generated(name, seed)
            found = fit(name, columns, y, bootstrap=100, seed=seed)
            assert found.predict(**far).loss == pytest.approx(law.predict(**far), rel=0.01)
        inside.append([low <= law.values[key] <= high for key, (low, high) in found.intervals.items()])
    assert (np.mean(inside, axis=0) >= 0.9).all(), np.mean(inside, axis=0)


OF_PUBLISHED = {  # size of the model, in millions -> the annealing law of a cosine and a constant schedule
    25: {"L0": 3.067, "A": 0.492, "C": 0.403, "alpha": 0.574},
    100: {"L0": 2.693, "A": 0.554, "C": 0.475, "alpha": 0.523},
    400: {"L0": 2.423, "A": 0.593, "C": 0.567, "alpha": 0.504},
}


@pytest.mark.parametrize(
    ("size", "mean", "worst"), [(25, 0.1397, 0.2252), (100, 0.1249, 0.2108), (400, 0.2025, 0.4136)]
)
def test_the_annealing_law_forecasts_published_curves(size, mean, worst):
    """Fitted to a constant and a cosine schedule alone; the errors of the unseen five in percent, as measured.

    A pilot had 0.16 and 0.23 at 25M, 0.13 and 0.21 at 100M, and 0.19 and 0.40 at 400M, which all points miss: the law's
    forecast of wsdcon_3, the worst at every size, is too low after the drop, at 400M by up to 0.92 %.
    """
    found = fit("annealing", [published("cosine_24000", size), published("constant_24000", size)])
    errors = [found.error_on(published(name, size)).mape for name in UNSEEN]
    assert found.law.values == pytest.approx(OF_PUBLISHED[size], abs=5e-4)
    assert [np.mean(errors), max(errors)] == pytest.approx([mean, worst], abs=5e-4)


def test_the_multi_power_law_forecasts_published_curves():
    """It needs a curve with a sudden decay beside the other two, and is refused without."""
    seen = [published(name).every(4) for name in ("cosine_24000", "constant_24000", "wsdcon_9")]
    found = fit("multi_power:resolution=200", seen)
    errors = [found.error_on(published(name)).mape for name in UNSEEN if name != "wsdcon_9"]
    assert np.mean(errors) < 0.13 and max(errors) < 0.33
    with pytest.raises(ValueError, match="do not determine"):
        fit("multi_power:resolution=200", seen[:2])
    with pytest.warns(UserWarning, match="C, beta may be wrong by a factor of 20"):
        fit("multi_power:resolution=400", [curve.every(3) for curve in seen[:2]])


def test_no_other_minimizer_finds_less():
    curves = [published(name).every(3) for name in ("cosine_24000", "constant_24000")]
    found = fit("annealing", curves)
    y = np.concatenate([curve.loss for curve in curves])
    problem = Problem(found.law, parts_of(found.law, curves), found.delta)
    assert problem.cost(problem.errors(problem.free_of(found.law), y)) == pytest.approx(found.objective, rel=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(3):
        start = problem.free_of(found.law) + rng.normal(0, 0.3, 4)
        other = minimize(lambda free: 1e5 * problem.cost(problem.errors(free, y)), start, method="BFGS")
        assert other.fun / 1e5 > found.objective * (1 - 1e-6)


def test_few_scores_forecast_the_next():
    law, tokens = laws.LogLaw(A=0.03, alpha=0.35, beta=1.2), 1e6 * 4.0 ** np.arange(6)
    found = fit("log", {"tokens": tokens[:4]}, law.predict(tokens=tokens[:4]))
    assert [np.log(found.law.A), found.law.alpha, found.law.beta] == pytest.approx([-3.50656, 0.35, 1.2], abs=1e-5)
    assert found.predict(tokens=tokens[4:]).loss == pytest.approx(law.predict(tokens=tokens[4:]), abs=1e-4)
    with pytest.raises(ValueError, match="where A tokens"):
        found.predict(tokens=1e3)


X = {"x": np.geomspace(1e3, 1e6, 6)}
Y = 1.5 + (1e3 / X["x"]) ** 0.3
HALVES = {"encoder": np.repeat([1e3, 1e4, 1e5], 3), "decoder": np.tile([2e3, 1e4, 5e4], 3)}
ANNEALING = laws.AnnealingLaw(**OF_SCHEDULES["annealing"])


@pytest.mark.parametrize(
    ("law", "data", "y", "options", "message"),
    [
        ("power", {"x": X["x"][:3]}, Y[:3], {}, "y has 3 points, and PowerLaw has 3 parameters: add points"),
        ("power", X, -Y, {}, "loss has the value"),
        ("power", X, [1, 2, 3, np.nan, 5, 6], {}, "loss has the value nan"),
        ("power", {"x": [1, 2, 3, 4, np.inf, 6]}, Y, {}, "x has the value inf"),
        ("power", {"x": [1, 2, 3, 1, 2, 3]}, Y, {}, "x has 3 distinct values: PowerLaw is determined by 4"),
        ("power", X, Y[:5], {}, "y has 5 rows and the columns 6"),
        ("power", X, None, {}, "y is missing"),
        ("power", X | {"z": 1}, Y, {}, "z is not a column of PowerLaw"),
        ("power", X, Y, {"delta": 0}, "delta is 0"),
        ("power", X, Y, {"bootstrap": -1}, "bootstrap is -1"),
        ("power", X, np.full(6, 2.0), {}, "do not determine"),
        ("encoder_decoder", HALVES, HALVES["encoder"] ** 0.1 / HALVES["decoder"] ** 0.2, {}, "pe goes to 0, the end"),
        ("power", [run(ANNEALING, "cosine")], None, {}, "needs a column x"),
        ("power", [], None, {}, "give a mapping of columns, a Curve"),
        ("parametric", {"params": [1e6] * 8, "tokens": 10.0 ** np.arange(8)}, np.ones(8), {}, "params has 1 distinct"),
        ("parametric", run(ANNEALING, "cosine"), None, {}, "has no params: set it"),
        ("annealing", [run(ANNEALING, "constant")], None, {}, "lr never falls below 0.9 of its peak in 1 curve"),
        ("annealing", [run(ANNEALING, "cosine")], Y, {}, "y is given beside curves"),
        ("annealing", [run(ANNEALING, "cosine")], None, {"block": 0}, "block is 0"),
    ],
)  # fmt: skip
def test_what_determines_no_law_is_refused(law, data, y, options, message):
    with pytest.raises(ValueError, match=message):
        fit(law, data, y, **options)


@pytest.fixture(scope="module")
def annealed():
    return fit("annealing", [run(ANNEALING, "constant", 1), run(ANNEALING, "cosine", 2)], bootstrap=25)


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (2 * rates("cosine"), "lr runs over 6e-05 to 0.0006, and the fit has seen 3e-05 to 0.0003"),
        (rates("cosine") * np.linspace(1, 0.5, 2000), "lr runs over"),
        (np.concatenate([rates("cosine"), np.zeros(50)]), "lr is zero at 50 successive steps"),
    ],
)
def test_forecasts_that_are_known_to_fail_are_refused(annealed, lr, message):
    with pytest.raises(ValueError, match=message):
        annealed.predict(lr=lr)
    assert np.isfinite(annealed.law.predict(lr=lr)).all()


def test_forecasts_far_ahead_warn(annealed):
    with pytest.warns(UserWarning, match="lr has 6001 steps, more than three times the 2000"):
        annealed.predict(lr=rates("cosine", 6001), step=6001)
    assert len(annealed.predict(lr=rates("cosine", 6000), step=6000).loss) == 1


def test_bands_and_intervals(annealed):
    assert (annealed.resampled, annealed.units, annealed.draws.shape) == ("blocks of curves", 46, (25, 4))
    wide, narrow = (annealed.predict(lr=rates("wsd"), step=[500, 2000], level=level) for level in (0.95, 0.5))
    assert (wide.low < narrow.low).all() and (narrow.high < wide.high).all()
    assert all(low < high for low, high in annealed.intervals.values())
    curves = [run(ANNEALING, "constant", 1), run(ANNEALING, "cosine", 2)]
    assert (fit("annealing", curves, bootstrap=5).draws == annealed.draws[:5]).all()
    assert not (fit("annealing", curves, bootstrap=5, seed=1).draws == annealed.draws[:5]).any()
    assert fit("annealing", curves, bootstrap=1, block=7).units == 26
    with pytest.raises(ValueError, match="level is 1"):
        annealed.predict(lr=rates("wsd"), level=1)


def test_without_a_bootstrap_there_is_no_band():
    found = fit("power", X, Y)
    assert found.intervals == {} and found.resampled == "nothing"
    assert np.isnan(found.predict(X).low).all() and np.isfinite(found.predict(X).loss).all()


def test_errors_are_relative_and_in_percent():
    found = fit("power", X, Y)
    errors = found.error_on(X, Y * np.array([1, 1, 1, 1, 1, 1 / 1.06]))
    assert errors == pytest.approx((1.0, 6.0, 1.0), rel=1e-4)
    assert found.error_on(X, Y).worst < 1e-6
    with pytest.raises(ValueError, match="y is missing"):
        found.error_on(X)
    with pytest.raises(ValueError, match="y has 5 rows and the columns 6"):
        found.error_on(X, Y[:5])


def test_a_fit_is_a_file(annealed, tmp_path):
    again = Fit.read(annealed.save(tmp_path / "fit.json"))
    assert (again.law, again.seen, again.intervals) == (annealed.law, annealed.seen, annealed.intervals)
    assert again.predict(lr=rates("wsd"), step=99).high == annealed.predict(lr=rates("wsd"), step=99).high
    assert (again.residuals == annealed.residuals).all() and again.units == annealed.units


@pytest.mark.parametrize("text", ["[]", "{", '{"law": "power"}', '{"law": "nonesuch"}'])
def test_files_that_are_no_fit(text, tmp_path):
    path = tmp_path / "fit.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"is not the file of a fit|choose one of"):
        Fit.read(path)


def test_a_law_of_a_user(monkeypatch, tmp_path):
    class Flat(laws.PowerLaw):
        pass

    found = fit(Flat, X, Y)
    with pytest.raises(ValueError, match="which is not in LAWS"):
        found.save(tmp_path / "fit.json")
    monkeypatch.setitem(LAWS, "flat", Flat)
    assert Fit.read(found.save(tmp_path / "fit.json")).law == found.law
    assert isinstance(laws.get("flat"), Law)


def test_published_schedules_are_within_each_other():
    """None of the forecasts of the other tests is near a refusal by its range."""
    found = fit("annealing", [published("cosine_24000").every(8), published("constant_24000").every(8)])
    for name in UNSEEN:
        assert found.predict(lr=schedule(name), step=[9000]).loss > 0

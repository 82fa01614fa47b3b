"""Laws of losses: formulas against golden values and literal sums, closed forms against searches, curves and files."""

import inspect
from math import nan

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from hf_xent import laws
from hf_xent.laws import LAWS, AnnealingLaw, Curve, EncoderDecoder, LogLaw, MultiPowerLaw, ParametricLoss, PowerLaw
from support.published_curves import PUBLISHED, published, schedule

HOFFMANN = ParametricLoss(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)
BESIROGLU = ParametricLoss(E=1.8172, A=482.01, alpha=0.3478, B=2085.43, beta=0.3658)


@pytest.mark.parametrize(
    ("law", "compute", "params", "tokens", "ratio", "loss"),
    [
        (HOFFMANN, 1e21, "1.824e+09", "9.136e+10", "50.1", "2.32888"),
        (HOFFMANN, 5.76e23, "3.219e+10", "2.982e+12", "92.6", "1.93075"),
        (BESIROGLU, 1e21, "2.778e+09", "5.999e+10", "21.6", "2.30553"),
        (BESIROGLU, 5.76e23, "7.225e+10", "1.329e+12", "18.4", "1.97444"),
    ],
)
def test_the_best_allocation_is_the_published_one(law, compute, params, tokens, ratio, loss):
    best = laws.compute_optimal(law, compute)
    assert (f"{best.params:.3e}", f"{best.tokens:.3e}") == (params, tokens)
    assert (f"{best.tokens_per_param:.1f}", f"{best.loss:.5f}") == (ratio, loss)
    searched = minimize_scalar(
        lambda n: float(law.predict(params=np.exp(n), tokens=compute / 6 / np.exp(n))),
        bounds=(10, 35),
        method="bounded",
    )
    assert np.exp(searched.x) == pytest.approx(best.params, rel=1e-2)
    assert searched.fun == pytest.approx(best.loss, rel=1e-9)


def test_allocations_refuse_what_is_no_amount():
    with pytest.raises(ValueError, match="compute is 0"):
        laws.compute_optimal(HOFFMANN, 0)
    with pytest.raises(ValueError, match="flops_per_token_and_param is -6"):
        laws.compute_optimal(HOFFMANN, 1e20, flops_per_token_and_param=-6)
    with pytest.raises(ValueError, match="params is nan"):
        laws.optimal_split(EncoderDecoder(1, 0.1, 0.1, 1), nan)


def test_the_best_split_of_an_encoder_decoder():
    law = EncoderDecoder(alpha=2.0, pe=0.15, pd=0.25, floor=1.1)
    assert law.encoder_share == pytest.approx(0.375)
    best = laws.optimal_split(law, 1e8)
    searched = minimize_scalar(
        lambda n: float(law.predict(encoder=n, decoder=1e8 - n)), bounds=(1e6, 9.9e7), method="bounded"
    )
    assert best.encoder + best.decoder == pytest.approx(1e8)
    assert searched.x == pytest.approx(best.encoder, rel=1e-3)
    assert searched.fun == pytest.approx(best.loss)


def test_an_encoder_decoder_along_a_fixed_share_is_a_power_law():
    law, sizes = EncoderDecoder(2.0, 0.15, 0.25, 1.1, decoder_unit=3e6), np.geomspace(1e6, 1e9, 5)
    along = law.predict(encoder=0.3 * sizes, decoder=0.7 * sizes) - law.floor
    assert np.diff(np.log(along)) / np.diff(np.log(sizes)) == pytest.approx(-0.4)


def test_sums_of_a_schedule():
    found = laws.sums([1, 1, 0.5, 0.5, 0, 0], decay=0.5)
    assert found.s1.tolist() == [1, 2, 2.5, 3, 3, 3]
    assert found.momentum.tolist() == [0, 0, 0.5, 0.25, 0.625, 0.3125]
    assert found.s2.tolist() == [0, 0, 0.5, 0.75, 1.375, 1.6875]


def test_the_annealing_area_is_its_double_sum():
    lr, decay = np.random.default_rng(0).random(17), 0.9
    literal = [
        sum((lr[k - 1] - lr[k]) * decay ** (i - k) for i in range(1, s + 1) for k in range(1, i + 1)) for s in range(17)
    ]
    assert laws.sums(lr, decay).s2 == pytest.approx(np.array(literal))
    law = AnnealingLaw(L0=2.0, A=0.5, alpha=0.4, C=0.1, decay=decay)
    expected = 2 + 0.5 * np.cumsum(lr)[[3, 16]] ** -0.4 - 0.1 * np.array(literal)[[3, 16]]
    assert law.predict(lr=lr, step=[4, 17]) == pytest.approx(expected)
    sized = AnnealingLaw(L0=2.0, A=0.5, alpha=0.4, C=0.1, B=30, beta=0.3, decay=decay, by_size=True)
    assert sized.predict(lr=lr, step=[4, 17], params=1e6) == pytest.approx(expected + 30 * 1e6**-0.3)


def multi_power(law, lr, steps):
    """The formula of the paper in loops over steps. The schedule has its peak at the first step of the second half."""
    values, warm = [], int(np.argmax(lr))
    for s in steps:
        drop = 0.0
        for k in range(warm + 1, s):
            since = law.C * lr[k] ** -law.gamma * sum(lr[k:s])
            drop += (lr[k - 1] - lr[k]) * (1 - (since + 1) ** -law.beta)
        values.append(law.L0 + law.A * sum(lr[:s]) ** -law.alpha - law.B * drop)
    return values


@pytest.mark.parametrize("kind", ["falling", "sudden", "rising again"])
def test_the_multi_power_law_is_its_literal_sum(kind):
    lr = np.concatenate([np.arange(1, 6) / 5, np.ones(5), np.linspace(1, 0.1, 30), np.full(8, 0.1)])
    if kind == "sudden":
        lr[12:] = 0.2
    if kind == "rising again":
        lr[30:36] = 0.6
    law = MultiPowerLaw(L0=2.5, A=0.5, alpha=0.4, B=0.3, C=1.5, beta=0.6, gamma=0.5, resolution=1)
    steps = [1, 7, 13, 33, 48]
    literal = multi_power(law, lr, steps)
    assert law.predict(lr=lr, step=steps) == pytest.approx(literal)
    if kind != "rising again":  # a block that falls and rises is no single decay
        coarse = law.having(resolution=4)
        assert coarse.predict(lr=lr, step=steps) == pytest.approx(literal, rel=2e-3)


def test_sudden_decays_are_exact_at_every_resolution():
    curve = published("wsdcon_9")
    law = MultiPowerLaw(L0=2.8, A=0.6, alpha=0.45, B=600, C=2e-3, beta=0.25, gamma=1.3)
    coarse, exact = (law.having(resolution=n).predict(lr=curve.lr, step=curve.step) for n in (1000, 1))
    assert coarse == pytest.approx(exact, rel=1e-12)


def test_the_log_law_of_scores():
    law, tokens = LogLaw(A=0.03, alpha=0.35, beta=1.2), 1e6 * 4.0 ** np.arange(6)
    assert law.predict(tokens=tokens).round(4).tolist() == [1.4066, 2.0436, 2.7159, 3.4174, 4.1439, 4.8923]
    with pytest.raises(ValueError, match=r"tokens has 1e\+04, where A tokens"):
        law.predict(tokens=[1e4, 1e6])


def test_the_power_law_against_its_other_form():
    x = np.geomspace(1e3, 1e9, 7)
    power, other = PowerLaw(1.5, 2e4, 0.3), laws.DownstreamLoss(E=1.5, A=2e4**0.3, alpha=0.3)
    assert power.predict(x=x) == pytest.approx(1.5 + (2e4 / x) ** 0.3)
    assert other.predict(tokens=x) == pytest.approx(power.predict(x=x))


@pytest.mark.parametrize("name", LAWS)
def test_every_law_says_what_it_is(name):
    row = next(row for row in laws.table() if row["name"] == name)
    assert row["class"] == LAWS[name].__name__
    assert row["formula"] and row["source"] and row["relations"]
    law = laws.get(name)
    assert all(row["help"][option] for option in row["options"])
    assert list(row["options"])[: len(law.parameters)] == list(law.parameters)
    assert {*law.starts, *law.linear} <= {*law.bounds}
    with pytest.raises(ValueError, match=f"{law.parameters[0]} is nan: fit the law"):
        law.predict(**{column: [1.0, 2.0] for column in law.columns})
    known = law.having(**dict.fromkeys(law.parameters, 1.25))
    assert "1.25" in known.describe()
    with pytest.raises(ValueError, match=f"{law.parameters[-1]} is -1"):
        law.having(**{law.parameters[-1]: -1.0})


def test_laws_by_name():
    assert laws.get("annealing:decay=0.99, by_size=True").columns == ("lr", "step", "params")
    assert laws.get(AnnealingLaw).parameters == ("L0", "A", "alpha", "C")
    assert laws.get(HOFFMANN) is HOFFMANN
    assert inspect.isclass(LAWS["log"])
    for wrong, message in [
        ("powr", "law is 'powr': choose one of"),
        ("annealing:decay=1", "decay is 1"),
        ("annealing:by_size=2", "by_size is 2"),
        ("multi_power:resolution=0", "resolution is 0"),
        ("encoder_decoder:encoder_unit=0", "encoder_unit is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            laws.get(wrong)


@pytest.mark.parametrize(
    ("law", "columns", "message"),
    [
        (HOFFMANN, {"params": 1e9}, "tokens is missing"),
        (HOFFMANN, {"params": 1e9, "tokens": 1e9, "steps": 1}, "steps is not a column of ParametricLoss"),
        (HOFFMANN, {"params": [1e9, 0.0], "tokens": 1e9}, "params has the value 0.0"),
        (HOFFMANN, {"params": [1e9] * 3, "tokens": [1e9] * 2}, "columns have the shapes"),
        (AnnealingLaw(2, 1, 0.5, 1), {"lr": [1.0, -1.0]}, "lr has a value that is negative"),
        (AnnealingLaw(2, 1, 0.5, 1), {"lr": [0.0, 0.0]}, "zero at every step"),
        (AnnealingLaw(2, 1, 0.5, 1), {"lr": 0.1}, "lr has the shape"),
        (AnnealingLaw(2, 1, 0.5, 1), {"lr": [0.1] * 4, "step": 5}, "step has 5, and lr has 4 steps"),
        (AnnealingLaw(2, 1, 0.5, 1), {"lr": [0.1] * 4, "params": 1e6}, "params is not a column of AnnealingLaw"),
        (AnnealingLaw(2, 1, 0.5, 1, 1, 1, by_size=True), {"lr": [0.1] * 4, "params": 0}, "params is 0"),
    ],
)
def test_columns_that_a_law_cannot_read(law, columns, message):
    with pytest.raises(ValueError, match=message):
        law.predict(**columns)


def test_a_curve_from_a_file(tmp_path):
    path = tmp_path / "cosine.csv"
    path.write_text(
        "# made by a test\nstep,lr,loss,tokens,params\n1,0.1,,64,1000\n2,0.2,5.5,128,1000\n3,0.1,5.25,192,1000\n"
    )
    curve = laws.read(path)
    assert (curve.name, curve.params, len(curve)) == ("cosine", 1000, 2)
    assert curve.lr.tolist() == [0.1, 0.2, 0.1]
    assert (curve.step.tolist(), curve.loss.tolist(), curve.tokens.tolist()) == ([2, 3], [5.5, 5.25], [128, 192])


def test_a_file_that_starts_after_the_warm_up(tmp_path):
    path = tmp_path / "late.csv"
    path.write_text("step,lr,loss\n4,0.4,3\n6,0.4,2.5\n8,0.2,2\n")
    assert laws.read(path, warmup=4).lr == pytest.approx(np.array([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.3, 0.2]))
    with pytest.raises(ValueError, match="starts at step 4: give warmup"):
        laws.read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,loss\n1,2\n", "has no lr: write step,lr,loss"),
        ("", "has no rows"),
        ("step,lr,loss\n1,much,2\n", "has a value that is no number"),
        ("step,lr,loss\n2,1,2\n1,1,2\n", "not in order"),
        ("step,lr,loss\n1,,2\n", "a step without its lr"),
        ("step,lr,loss\n1,0.1,-2\n", "loss has the value -2.0"),
    ],
)
def test_files_that_are_no_curve(text, message, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        laws.read(path)


def test_parts_of_a_curve():
    curve = Curve(np.full(10, 0.1), np.arange(1, 11), np.arange(10, 0, -1.0), tokens=np.arange(10) * 64)
    assert curve.after(7).step.tolist() == [8, 9, 10]
    assert curve.every(4).step.tolist() == [2, 6, 10]
    means = curve.averaged(3)
    assert (means.step.tolist(), means.loss.tolist(), means.tokens.tolist()) == ([3, 6, 9], [8, 5, 2], [128, 320, 512])
    assert len(means.lr) == 10
    for wrong, message in [
        ({"loss": [1.0]}, "loss has the shape"),
        ({"step": [1] * 10}, "step is not in order after 1"),
        ({"loss": [nan] * 10}, "loss has the value nan"),
        ({"tokens": [1]}, "tokens has the shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            Curve(**{"lr": curve.lr, "step": curve.step, "loss": curve.loss} | wrong)
    with pytest.raises(ValueError, match="count is 0"):
        curve.every(0)


@pytest.mark.parametrize(
    ("name", "step", "rate"),
    [
        ("cosine_24000", 2288, 0.0002999771173709568),
        ("cosine_24000", 23920, 3.000893868085248e-05),
        ("wsd_20000_24000", 20064, 0.0002891487070871911),
        ("wsd_20000_24000", 23904, 3.170452527640976e-05),
        ("wsdld_20000_24000", 20064, 0.00029568),
        ("wsdcon_18", 7936, 0.0003),
        ("wsdcon_18", 8000, 0.00018),
    ],
)
def test_published_schedules_are_those_of_the_published_files(name, step, rate):
    assert "MIT License" in PUBLISHED["license"] and "MultiPowerLaw" in PUBLISHED["source"]
    assert schedule(name)[step - 1] == pytest.approx(rate, rel=1e-12)

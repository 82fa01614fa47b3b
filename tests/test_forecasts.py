"""Forecasts from curves: schedules as transformers sets them, the law by loops, what is refused, the command line."""

import csv
import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hf_xent import cli, laws
from hf_xent.experiments import law_figures
from hf_xent.experiments.forecasting import Schedule, fitted, forecast, opened_curves
from hf_xent.experiments.law_data import load_rows
from hf_xent.laws.annealing import AnnealingLaw
from hf_xent.laws.parametric import ParametricLoss

EXAMPLES = Path(__file__).parents[1] / "examples"
PEAK, WARMUP, STEPS = 0.02, 10, 240
TRUTH = AnnealingLaw(2.5, 0.6, 0.5, 1.5, decay=0.95)
LAW = "annealing:decay=0.95"
WSD = "warmup_stable_decay:num_decay_steps=60"
PNG = b"\x89PNG"
runner = CliRunner()


def made(name, steps=STEPS, peak=PEAK, noise=0.002, **options):
    """A curve of the true law with noise; the first losses, in the warm-up, are far from it."""
    lr = Schedule(name, steps, peak, WARMUP, options).rates()
    step = np.arange(2, steps + 1)
    errors = noise * np.random.default_rng(len(name)).standard_normal(len(step))
    loss = TRUTH.predict(lr=lr, step=step) * np.exp(errors)
    loss[: WARMUP - 1] = 20
    return laws.Curve(lr, step, loss, params=1e6, tokens=512.0 * step, name=name)


def write(curve, folder):
    path = folder / f"{curve.name}.csv"
    known = dict(zip(curve.step.tolist(), curve.loss.tolist(), strict=True))
    rows = [[i + 1, rate, known.get(i + 1, ""), 512 * (i + 1), 1e6] for i, rate in enumerate(curve.lr.tolist())]
    lines = ["# {}", "step,lr,loss,tokens,params", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def known():
    return [made("constant_with_warmup"), made("cosine")]


@pytest.fixture(scope="module")
def files(known, tmp_path_factory):
    folder = tmp_path_factory.mktemp("curves")
    return [str(write(curve, folder)) for curve in known]


def by_loops(law, lr):
    """The loss after the last step, as the paper writes it."""
    s1 = momentum = s2 = 0.0
    before = lr[0]
    for rate in lr:
        momentum = law.decay * momentum + (before - rate)
        s1, s2, before = s1 + rate, s2 + momentum, rate
    return law.L0 + law.A * s1**-law.alpha - law.C * s2


def test_rates_are_those_of_the_formulas():
    warm = [PEAK * i / WARMUP for i in range(WARMUP)]
    share = [(i - WARMUP) / (STEPS - WARMUP) for i in range(WARMUP, STEPS)]
    cosine = [PEAK * 0.5 * (1 + math.cos(math.pi * x)) for x in share]
    assert Schedule("cosine", STEPS, PEAK, WARMUP).rates() == pytest.approx([*warm, *cosine], rel=1e-12)
    linear = Schedule("linear", STEPS, PEAK, WARMUP).rates()
    assert linear == pytest.approx([*warm, *(PEAK * (1 - x) for x in share)], rel=1e-12)
    options = {"num_decay_steps": 60, "decay_type": "linear", "min_lr_ratio": 0.1}
    decay = [PEAK * (0.1 + 0.9 * (1 - i / 60)) for i in range(60)]
    stable = Schedule("warmup_stable_decay", STEPS, PEAK, 0, options).rates()
    assert stable == pytest.approx([*[PEAK] * (STEPS - 60), *decay], rel=1e-9)


def test_a_forecast_is_the_law_by_loops_and_near_the_truth(known):
    found = forecast(known, WSD, 360, LAW, bootstrap=10)
    assert found.schedule == Schedule("warmup_stable_decay", 360, PEAK, WARMUP, {"num_decay_steps": 60})
    loss, low, high = found.end
    assert loss == pytest.approx(by_loops(found.fit.law, found.lr), rel=1e-12)
    assert loss == pytest.approx(by_loops(TRUTH, found.lr), rel=0.01) and low < loss < high
    assert found.step[0] == WARMUP + 1 and found.step[-1] == 360 and len(found.loss) == len(found.step)
    held_out = made("warmup_stable_decay", num_decay_steps=60).after(WARMUP)
    assert found.fit.error_on(held_out).mape < 0.5
    assert 5 * found.fit.error_on(held_out).mape < laws.fit(
        "power", {"x": np.concatenate([c.after(WARMUP).step for c in known])},
        np.concatenate([c.after(WARMUP).loss for c in known]),
    ).error_on({"x": held_out.step}, held_out.loss).mape  # fmt: skip


def test_files_and_curves_forecast_alike(known, files):
    ours, theirs = (forecast(given, "linear", 200, LAW, bootstrap=0) for given in (known, files))
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-9) and np.isnan(theirs.low).all()
    assert ours.at(known[1])[: WARMUP - 1].tolist() == pytest.approx([math.nan] * (WARMUP - 1), nan_ok=True)


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")  # transformers', of the last one
@pytest.mark.parametrize(
    ("schedule", "steps", "law", "message"),
    [
        ("cosine", None, LAW, "steps is not given"),
        ("greedy", 200, LAW, "schedule is 'greedy', which follows losses"),
        ("reduce_lr_on_plateau", 200, LAW, "follows evaluations"),
        ("nonesuch", 200, LAW, "schedule is 'nonesuch' with"),
        ("cosine:period=3", 200, LAW, "schedule is 'cosine' with"),
        ("cosine", 8, LAW, "warmup is 10 of 8 steps"),
        ("cosine", 200, "parametric", "does not read a schedule: choose one of annealing"),
        (Schedule("cosine", 200, PEAK), 300, LAW, "steps is 300 beside a Schedule of 200"),
        (Schedule("cosine", 200, 3 * PEAK), None, LAW, "fit also to a curve of this range"),
        (WSD + ", num_stable_steps=50", 240, LAW, "cut them off, for nothing is learned there"),
    ],
)
def test_forecasts_that_are_refused(known, schedule, steps, law, message):
    with pytest.raises(ValueError, match=message):
        forecast(known, schedule, steps, law, bootstrap=0)


def test_what_the_curves_have_to_have(known):
    with pytest.raises(ValueError, match=r"peak is 0.01, 0.02 in the curves: give the peak"):
        Schedule.like([known[0], made("cosine", peak=0.01)], "cosine", 100)
    assert Schedule.like([known[0], made("cosine", peak=0.01)], "cosine", 100, peak=0.02).warmup == WARMUP
    with pytest.raises(ValueError, match="curves is empty"):
        opened_curves([])
    with pytest.raises(ValueError, match="has no losses after its warm-up"):
        fitted([laws.Curve([0.1, 0.2], [1], [3.0], name="short")], LAW)
    for options, message in (({"peak": 0.0}, "peak is 0.0"), ({"steps": 0}, "steps is 0"), ({"warmup": -1}, "warmup")):
        with pytest.raises(ValueError, match=message):
            Schedule(**{"name": "cosine", "steps": 10, "peak": 1.0} | options)


def test_far_forecasts_warn(known):
    with pytest.warns(UserWarning, match="more than three times"):
        forecast(known, "cosine", 4 * STEPS, LAW, bootstrap=0)


CONSTANTS = ParametricLoss(1.7, 400.0, 0.34, 410.0, 0.28)


@pytest.fixture
def grid(tmp_path):
    """A table of losses of 4 sizes and 3 budgets, and the same as curves that end there."""
    rows = [(n, d, float(CONSTANTS.predict(params=n, tokens=d))) for n in (1e6, 3e6, 9e6, 3e7) for d in (1e8, 4e8, 2e9)]
    lines = ["loss,tokens,params", *(f"{loss!r},{d!r},{n!r}" for n, d, loss in rows)]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    for i, (n, d, loss) in enumerate(rows):
        curve = "".join(f"{s},{0.1 * (5 - s)},{loss if s == 4 else 9},{d * s / 4},{n}\n" for s in range(1, 5))
        (tmp_path / f"run{i}.csv").write_text("step,lr,loss,tokens,params\n" + curve)
    return tmp_path


def test_rows_of_tables_and_of_the_ends_of_curves(grid):
    table = load_rows([grid / "table.csv"], ParametricLoss())
    ends = load_rows([grid / f"run{i}.csv" for i in range(12)], ParametricLoss())
    assert table.y.tolist() == ends.y.tolist() and len(table.y) == 12
    assert {name: values.tolist() for name, values in table.columns.items()} == {
        name: values.tolist() for name, values in ends.columns.items()
    }
    power = load_rows([grid / "run0.csv"], laws.get("power"), x="tokens")
    assert power.columns["x"].tolist() == [2.5e7, 5e7, 7.5e7, 1e8] and power.y[0] == 9
    assert load_rows([grid / "run0.csv"], laws.get("power"), x="params").columns["x"].tolist() == [1e6]


@pytest.mark.parametrize(
    ("names", "law", "x", "message"),
    [
        (["table.csv"], "power", None, "x is missing"),
        (["table.csv"], "parametric", "tokens", "but ParametricLoss reads params, tokens: leave x out"),
        (["table.csv", "run0.csv"], "parametric", None, "give one kind of them"),
        (["table.csv"], "power", "flops", "has no column 'flops'"),
        (["run0.csv"], "power", "lr", "lr is not known of a curve"),
        (["words.csv"], "power", "tokens", "has a value that is no number"),
    ],
)
def test_rows_that_are_refused(grid, names, law, x, message):
    (grid / "words.csv").write_text("loss,tokens\n3,many\n")
    with pytest.raises(ValueError, match=message):
        load_rows([grid / name for name in names], laws.get(law), x)


def invoke(*arguments):
    result = runner.invoke(cli.app, ["scaling", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def test_commands_fit_forecast_and_plot_schedules(files, tmp_path):
    few = ["--law", LAW, "--bootstrap", 4, "--points", 60]
    shown = json.loads(invoke("fit", *files, *few, "--output", tmp_path / "fit.json", "--json").stdout)
    assert set(shown["parameters"]) == {"L0", "A", "alpha", "C"} and shown["mean_error"] < 1
    assert all(row["low"] <= row["high"] for row in shown["parameters"].values())
    assert laws.Fit.read(shown["output"]).law.values["C"] == shown["parameters"]["C"]["value"]
    shown = json.loads(
        invoke(
            "forecast", *files, *few, "--schedule", WSD, "--steps", 300, "--output", tmp_path / "f.csv", "--json"
        ).stdout
    )
    assert shown["loss"] == pytest.approx(
        by_loops(TRUTH, Schedule.like(opened_curves(files), WSD, 300).rates()), rel=0.01
    )
    with (tmp_path / "f.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(rows[-1][name]) for name in ("step", "loss", "low")] == [300, shown["loss"], shown["low"]]
    plain = invoke("forecast", *files, "--law", LAW, "--bootstrap", 0, "--steps", 300, "--peak", 0.01, "--warmup", 5)
    assert "cosine, 300 steps: loss" in plain.stdout and "[" not in plain.stdout.splitlines()[0]
    picture = tmp_path / "law.png"
    measured = write(made("warmup_stable_decay", num_decay_steps=60), tmp_path)
    invoke("plot", *files, *few, "--schedule", WSD, "--steps", STEPS, "--measured", measured, "--output", picture)
    assert picture.read_bytes().startswith(PNG)


def test_commands_fit_and_plot_tables_and_allocate(grid):
    table, fit, picture = grid / "table.csv", grid / "fit.json", grid / "law.png"
    shown = invoke("fit", table, "--law", "parametric", "--bootstrap", 0, "--output", fit).stdout
    assert "parametric: 12 points" in shown and "alpha" in shown
    invoke("plot", table, "--law", "parametric", "--bootstrap", 0, "--output", picture)
    assert picture.read_bytes().startswith(PNG)
    best = json.loads(invoke("allocate", fit, "1e17", "--json").stdout)
    ours = laws.compute_optimal(CONSTANTS, 1e17)
    assert best["params"] == pytest.approx(ours.params, rel=0.01) and best["loss"] == pytest.approx(ours.loss, rel=1e-3)
    assert best["extrapolated"] == [] or best["tokens"] > 2e9
    assert "beyond what the law was fitted to" in invoke("allocate", fit, "1e22").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "--x", "tokens"), "x is 'tokens', but AnnealingLaw reads schedules"),
        (("plot", "--x", "tokens"), "x is 'tokens', but AnnealingLaw reads schedules"),
        (("plot", "--steps", 5), "a forecast needs the first two"),
        (("plot", "--law", "power", "--x", "step", "--schedule", "cosine", "--steps", 5), "PowerLaw reads none"),
        (("fit", "--law", "nonesuch"), "law is 'nonesuch': choose one of power"),
    ],
)
def test_commands_refuse_what_has_no_effect(files, arguments, message):
    command, *options = arguments
    with pytest.raises(ValueError, match=message):
        invoke(command, *files, *options)


def test_allocation_needs_the_parametric_law(known, tmp_path):
    path = fitted(known, LAW).save(tmp_path / "fit.json")
    with pytest.raises(ValueError, match="has a fit of AnnealingLaw: fit the law 'parametric' instead"):
        invoke("allocate", path, "1e20")


def test_the_laws_of_help_are_those_of_the_registry():
    shown = " ".join(invoke("fit", "--help").stdout.split())
    assert all(name in shown for name in laws.LAWS)


def test_figures_show_two_columns_at_most(tmp_path):
    fit = laws.Fit(TRUTH.having(by_size=True, B=1.0, beta=0.1), np.zeros(1), 0.0, 1e-3, {}, np.empty((0, 6)))
    with pytest.raises(ValueError, match="a figure shows two at most"):
        law_figures.draw_columns(fit, {}, [], tmp_path / "law.png")


WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven", "wizards", "mix", "potions"]


@pytest.fixture
def text(tmp_path):
    draw = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(draw.choice(WORDS, 60))}) for _ in range(300)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "text.jsonl")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* may be wrong by a factor of 20:UserWarning")  # of twenty steps
def test_examples_train_forecast_and_resume(text, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name, changes, options in (
        ("loss_curves", {"SHAPE": (16, 1), "EVERY": 5}, {"steps": 60}),
        ("scaling_grid", {"WIDTHS": (16, 32, 48, 64), "BUDGETS": (5, 10, 20), "HELD": [(64, 20), (48, 20)]}, {}),
    ):
        main = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
        for constant, value in changes.items():
            monkeypatch.setitem(main.__globals__, constant, value)
        output = tmp_path / name
        found = main(text=text, seeds=1, output=output, **options)
        assert len(found) in (4, 5) and all(row[0]["mean %"] >= 0 for row in found.values())
        curves = {path: path.read_text() for path in output.rglob("*.csv")}
        assert len(curves) == (3 if name == "loss_curves" else 12)
        assert main(text=text, seeds=1, output=output, **options) == found
        assert {path: path.read_text() for path in output.rglob("*.csv")} == curves
        assert (
            next(output.glob("*.png")).read_bytes().startswith(PNG)
            and "| mean % |" in (output / "README.md").read_text()
        )

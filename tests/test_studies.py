"""Studies of the methods: what is decided beforehand, its power against simulated tests, and the blocks of pages."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp
from typer.testing import CliRunner

from benchmarks.studies import __main__, plan
from benchmarks.studies.plan import Plan, write_page
from hf_xent.experiments.claims import BETTER, NONE, SMALL, UNDECIDED, WORSE, Claim, detectable
from hf_xent.experiments.study import Study


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_a_detectable_difference_is_found_by_four_of_five_simulated_tests(seeds):
    shift = detectable(spread=0.5, seeds=seeds)
    draws = np.random.default_rng(0).normal(shift, 0.5, size=(20_000, seeds))
    assert (ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)


def test_power_refuses_what_has_no_answer():
    assert detectable(1.0, 1) == np.inf and detectable(0.0, 5) == 0
    with pytest.raises(ValueError, match=r"spread is nan"):
        detectable(float("nan"), 5)
    with pytest.raises(ValueError, match=r"power is 1\.5"):
        detectable(1.0, 5, power=1.5)
    with pytest.raises(ValueError, match=r"margin is 0"):
        Claim("ours", "loss", 0)


def filled(folder, gaps):
    study = Study("Toy", ("loss",), baseline="plain", output=folder, seeds=4)
    for seed, gap in enumerate(gaps):
        study.record("plain", seed, loss=3.0 + seed)
        study.record("ours", seed, loss=3.0 + seed + gap)
        study.record("control", seed, loss=2.5 + seed)
    return study


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ((-0.5, -0.6, -0.4, -0.5), BETTER),
        ((-0.05, -0.06, -0.04, -0.05), SMALL),
        ((-0.05, -0.15, -0.1, -0.1), BETTER),
        ((0.5, 0.6, 0.4, 0.5), WORSE),
        ((0.01, -0.01, 0.02, -0.02), NONE),
        ((0.9, -0.9, 0.8, -0.8), UNDECIDED),
        ((-0.5,), UNDECIDED),
    ],
)
def test_verdicts_of_a_loss(tmp_path, gaps, verdict):
    assert Claim("ours", "loss", margin=0.1, higher=False).verdict(filled(tmp_path, gaps)) == verdict


def test_compare_prints_a_difference_that_no_claim_asks_for(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    study = __main__.plans("noisefit")[0].study()
    for seed, gap in enumerate([0.5, 0.7, 0.6, 0.6]):
        study.record("control", seed, loss=2.0 + seed)
        study.record("ours", seed, loss=2.0 + seed + gap)
    result = CliRunner().invoke(__main__.app, ["compare", "noisefit", "ours", "control", "loss", "absent"])
    low, high = ttest_1samp([0.5, 0.7, 0.6, 0.6], 0).confidence_interval(0.95)
    assert result.output == f"noisefit: loss, ours - control: 0.6 [{low:.4g}, {high:.4g}]\n"
    misspelt = CliRunner().invoke(__main__.app, ["compare", "noisefit", "our", "control", "loss"])
    assert "'our' and 'control' have no common runs with ['loss']" in str(misspelt.exception)


def test_a_claim_may_be_about_another_arm_than_the_baseline(tmp_path):
    study = filled(tmp_path, (0.0, 0.2, 0.1, 0.1))
    claim = Claim("ours", "loss", margin=0.1, higher=False, against="control")
    low, high = claim.interval(study)
    assert (low + high) / 2 == pytest.approx(-0.6) and claim.verdict(study) == WORSE
    assert claim.spread(study) == pytest.approx(np.std([0.5, 0.7, 0.6, 0.6], ddof=1))


def toy(arm, seed, job):
    return {"loss": 3.0 + seed % 2 - 0.5 * (arm == "ours")}


def test_a_pilot_runs_its_own_arms_among_them_those_of_the_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    claim = Claim("ours", "loss", margin=0.1, higher=False)
    made = Plan("toy", ("plain", "ours", "other"), "plain", ("loss",), (claim,), 1, toy, pilot=("plain", "ours"))
    job = plan.Job(tmp_path / "work")
    made.execute(job, pilot=True)
    made.execute(job)
    assert set(made.study(pilot=True).results) == {"plain", "ours"}
    assert set(made.study().results) == {"plain", "ours", "other"}
    for found in (found for plans in map(__main__.plans, __main__.STUDIES) for found in plans if found.pilot):
        claimed = {arm for claim in found.claims for arm in (claim.arm, claim.against or found.baseline)}
        assert claimed <= set(found.pilot) <= set(found.arms), found.name


def test_a_plan_runs_once_and_writes_the_blocks_of_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    claim = Claim("ours", "loss", margin=0.1, higher=False)
    made = Plan("toy", ("plain", "ours"), "plain", ("loss",), (claim,), seeds=3, run=toy)
    job = plan.Job(tmp_path / "work")
    made.execute(job, pilot=True, seeds=range(2))
    made.execute(job)
    stored = (tmp_path / "toy/results.json").read_text()
    made.execute(job)
    assert (tmp_path / "toy/results.json").read_text() == stored  # nothing was left to run
    assert sorted(made.study(pilot=True).values("ours", "loss")) == [100, 101]
    page = tmp_path / "toy.md"
    page.write_text("# Toy\n<!-- decided: toy --><!-- end -->\nText.\n<!-- results: toy --><!-- end -->\n")
    write_page(page, (made,))
    written = page.read_text()
    assert (
        "| ours against plain: loss, 0.1 or more | 0.5 [0.5, 0.5] | better |" in written
        and "6 of 6 planned runs" in written
    )
    assert "| ours | plain | loss | lower | 0.1 | 0 | 0 |" in written and "| loss, ours | 2.5 | 3.5 | 2.5 |" in written
    write_page(page, (made,))
    assert page.read_text() == written
    assert plan.summary({"toy": (made,)}).splitlines()[2].startswith("| [toy](toy.md) | ours against plain: loss")
    page.write_text("# Toy\n")
    with pytest.raises(ValueError, match=r"has no block `<!-- decided: toy -->"):
        write_page(page, (made,))


def test_a_study_stops_in_time_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    made = Plan("toy", ("plain", "ours"), "plain", ("loss",), (), seeds=2, run=toy)
    made.execute(plan.Job(tmp_path), minutes=-1)
    assert not made.study().results
    made.execute(plan.Job(tmp_path))
    assert {arm: len(rows) for arm, rows in made.study().results.items()} == {"plain": 2, "ours": 2}


def test_processes_share_the_seeds_of_a_study(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    made = Plan("toy", ("plain", "ours"), "plain", ("loss",), (), seeds=4, run=toy)
    made.execute(plan.Job(tmp_path), seeds=__main__.chosen_seeds("3:4"))
    made.execute(plan.Job(tmp_path), seeds=__main__.chosen_seeds("1:3"))
    assert sorted(made.study().values("ours", "loss")) == [1, 2, 3]
    made.execute(plan.Job(tmp_path), pilot=True, seeds=__main__.chosen_seeds("1:2"))
    assert sorted(made.study(pilot=True).values("ours", "loss")) == [101]
    assert __main__.chosen_seeds("3") == range(3) and __main__.chosen_seeds("") is None


@pytest.mark.parametrize("text", ["0", "3:3", "4:2", "x", "-1", "1:", "1:2:3"])
def test_seeds_that_name_none_are_refused(text):
    with pytest.raises(ValueError, match=rf"seeds is '{text}': give a number of seeds, such as 3, or"):
        __main__.chosen_seeds(text)


def test_a_larger_budget_has_results_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    made = Plan("toy", ("plain",), "plain", ("loss",), (), seeds=1, run=toy)
    made.execute(plan.Job(tmp_path, budget=2.0))
    assert (tmp_path / "toy/cpu-2/results.json").exists() and not made.study().results
    assert plan.Job(tmp_path, budget=0.5).scaled(7) == 4 and plan.Job(tmp_path, tiny=True).scaled(7, tiny=2) == 2


def test_learning_rates_that_were_tried_stand_beside_what_was_decided(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    made = Plan("toy", ("plain",), "plain", ("loss",), (), seeds=1, run=toy)
    assert "learning rate" not in made.decided()
    study = plan.tuning("toy", plan.Job(tmp_path / "work"), {"steps": 3})
    assert study.tuned("plain", (1e-3, 1e-4), lambda rate: 10 * rate) == 1e-3
    block = made.decided().splitlines()
    assert block[-3:] == ["| learning rate tried | 0.0001 | 0.001 |", "|---|---:|---:|", "| plain | 0.001 | 0.01 |"]
    other = plan.tuning("toy", plan.Job(tmp_path / "work", budget=0.5))
    assert not other.tried and tmp_path / "work" in other.output.parents

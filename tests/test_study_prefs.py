"""Studies of preferences: the task against counts by hand, measures against other code, and all arms, tiny."""

import copy
import math

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from benchmarks.studies import naming, naming_curves, naming_models, osp, preferences
from benchmarks.studies.plan import Job
from hf_xent.experiments.study import Study

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return Job(tmp_path_factory.mktemp("work"), tiny=True)


def test_the_utility_counts_what_was_asked_for():
    request = "name three fruits :"
    assert naming.utility(request, "old pear , honestly , new peach , red plum .") == 0
    assert naming.utility(request, "old pear , new peach .") == -1  # one is missing
    assert naming.utility(request, "old pear , new pear , red plum .") == -2  # one is missing, one is repeated
    assert naming.utility(request, "old pear , new peach , red plum , red saw , red cow .") == -2
    p = naming.probability(request, "old pear , new peach , red plum .", "old pear .")
    assert math.log(p / (1 - p)) == pytest.approx(2 / naming.SCALE)


def test_votes_are_drawn_from_the_known_probability_and_labels_keep_it():
    rows = naming.pairs(4000, "a", 0, 1, 2)
    p, votes = np.array([row["p"] for row in rows]), np.array([row["votes"] for row in rows])
    for value in (0.5, 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))):  # utilities that differ by 0, 1 and -1
        assert votes[abs(p - value) < 1e-9].mean() == pytest.approx(value, abs=0.05)
    data = naming.labelled(rows, [votes.mean() for votes in votes])
    assert min(data["preference_prob"]) >= 0.5
    i = next(i for i, row in enumerate(rows) if sum(row["votes"]) == 1)  # the second answer has two of three votes
    assert data[i]["chosen"] == " " + rows[i]["second"] and data[i]["preference_prob"] == pytest.approx(2 / 3)
    assert not set(naming.prompts(3)) & set(naming.prompts(0, 1, 2)) and len(naming.prompts(0, 1, 2, 3)) == 16


def test_calibration_agrees_with_other_code():
    rng = np.random.default_rng(0)
    q = rng.uniform(size=5000)
    y = (rng.uniform(size=5000) < q**2).astype(float)  # a label is a known probability of 0 or 1
    found = naming_models.calibration(torch.tensor(q), torch.tensor(y))
    share, said = calibration_curve(y, q, n_bins=10)
    weights = np.histogram(q, bins=10, range=(0, 1))[0] / len(q)
    assert found["calibration error"] == pytest.approx((weights * abs(share - said)).sum())
    assert found["squared error"] == pytest.approx(brier_score_loss(y, q))
    exact = naming_models.calibration(torch.tensor(q), torch.tensor(q))
    assert exact["calibration error"] == exact["squared error"] == 0


def test_a_curve_is_the_mean_over_all_pairs_of_all_seeds(tmp_path):
    study, (low, *_, high) = Study("toy", (), "DPO", tmp_path), naming_models.CONFIDENCES
    for seed, (share, said, known) in enumerate([(0.1, 0.52, 0.6), (0.3, 0.56, 0.5)]):
        study.record("DPO", seed, **{f"{low}: share": share, f"{low}: said": said, f"{low}: known": known})
    study.record("DPO", 2, **{f"{high}: share": 0.2, f"{high}: said": 0.95, f"{high}: known": 0.9})
    assert np.array(naming_curves.curve(study, "DPO", "")) == pytest.approx(np.array([[0.55, 0.525], [0.95, 0.9]]))
    assert naming_curves.curve(study, "DPO", "stopped ") == []


def test_the_examiner_reads_the_log_probabilities_that_the_trainer_does(job):
    trainer, epochs = preferences.fitted("SPCE, known p", 0, job)
    examiner, table = epochs.examiner, trainer.train_dataset
    names = {"prompt": "prompt", "first": "chosen", "second": "rejected"}
    rows = [{name: row[column].removesuffix(naming.END) for name, column in names.items()} for row in table]
    margins = examiner._margins(examiner.reference, rows)
    expected = np.array(table["ref_chosen_logps"]) - np.array(table["ref_rejected_logps"])
    np.testing.assert_allclose(margins, expected, atol=1e-4)


def test_a_policy_that_is_the_reference_has_no_divergence_and_wins_half(job):
    model = naming_models.base(job, "writer")
    examiner = naming_models.Examiner(model, naming.pairs(20, "t", 3), naming.pairs(20, "v", 0), 0.3, 4, 0)
    answered = examiner.answered(model)
    assert answered["KL"] == pytest.approx(0, abs=1e-6) and answered["wins"] == 0.5
    assert examiner.validated(model) == pytest.approx(math.log(2)) and examiner.judged(model)["margin size"] == 0
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.transformer.wte.weight, std=0.5)
    assert examiner.answered(other)["KL"] > 0.1


def test_all_arms_of_preferences_run(job):
    plan = preferences.PLANS[0]
    found = {arm: plan.run(arm, 0, job) for arm in plan.arms}
    for arm in preferences.ARMS:
        assert all(math.isfinite(found[arm][name]) for name in plan.metrics), arm
        assert 0 <= found[arm]["calibration error"] <= 1 and 0 <= found[arm]["accuracy"] <= 1
    different = ("DPO", "cDPO", "SPCE, known p", "PSO, known p")
    assert len({found[arm]["validation"] for arm in different}) == 4
    assert {claim.arm for claim in plan.claims} <= set(plan.arms) and set(plan.metrics) <= set(found["DPO"])


def test_all_judges_of_osp_run(job):
    plan = preferences.PLANS[1]
    found = {arm: plan.run(arm, 0, job) for arm in plan.arms}
    for arm in osp.ARMS:
        assert all(math.isfinite(found[arm][name]) for name in plan.metrics), arm
    assert found["program"]["pairs right"] == 1 > found["random judge"]["pairs right"]
    assert found["program"]["strength error"] < found["reward head"]["strength error"]
    assert found["self-judge"]["pairs right"] == found["self-judge, hard"]["pairs right"]  # in round 0
    rewards = osp.reward_judge(job, 0)
    rows = [{"prompt": "name two fruits :"}] * 2
    texts = ["old pear .", "old pear , new peach ."]
    torch.testing.assert_close(rewards(rows, texts, texts[::-1]), 1 - rewards(rows, texts[::-1], texts))
    chances = osp.chance(rows, texts, texts[::-1])
    assert chances == osp.chance(rows, texts, texts[::-1]) and chances[0] != chances[1]

"""The study of F2C: every arm on tiny settings, its own measures by hand, and the plans that read other runs."""

from functools import partial

import numpy as np
import pytest

from benchmarks.studies import f2c, f2c_measures, f2c_when, plan
from benchmarks.studies.f2c_items import KEPT, SETS
from benchmarks.studies.plan import Job
from hf_xent.experiments.study import Study

pytestmark = pytest.mark.usefixtures("without_progress_bars")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("f2c"), tiny=True)
    return {arm: f2c.run(arm, 0, job, "continents") for arm in f2c.ARMS}, job


def test_every_arm_is_measured(found):
    rows, job = found
    for arm, row in rows.items():
        assert {*f2c.METRICS} <= row.keys() and np.isfinite([*row.values()]).all()
        assert all(0 <= row[name] <= 1 for name in f2c.METRICS if name != "amplification")
        assert row["train_vote_share"] == rows["untrained"]["train_vote_share"], "the same untrained model"
        assert ("consensus" in row) == (arm in f2c.METHODS)
    assert rows["untrained"]["amplification"] == 0
    assert rows["vote"]["agreement"] == rows["constant predictor"]["agreement"] == 1
    assert rows["vote"]["f1"] != rows["constant predictor"]["f1"] or rows["vote"]["largest_share"] == 1
    assert [file.name for file in job.work.glob("*.npz")] == ["untrained-continents-0-6.npz"]


def test_training_changes_scores_and_the_untrained_ones_are_read_again(found):
    _, job = found
    model, tokenizer = f2c.load(job)
    evaluation = f2c.Evaluation("continents", 0, job, tokenizer)
    kept = f2c.untrained("continents", 0, job, evaluation, None)
    trainer = f2c.trainer_of("swarm", model, 0, job, evaluation.parts["train"], rate=1e-1)
    trainer.train()
    after = evaluation.scores(trainer)
    assert after.keys() == kept.keys() - {"train"}
    assert all(np.abs(after[part] - kept[part]).max() > 1e-3 for part in after)


def test_items_and_formats_of_a_seed_are_apart(found):
    _, job = found
    pilot, study = f2c.items_of("continents", job)
    train, test = f2c.split("continents", 0, job)
    groups = [{item["group"] for item in part} for part in (pilot, train, test)]
    assert sum(map(len, groups)) == len(set.union(*groups)) and len(train) + len(test) == len(study)
    assert {item["group"] for part in f2c.split("continents", 100, job) for item in part} == groups[0]
    trained, new = f2c.drawn("continents", 0, job)
    assert len({form.template for formats in (trained, new) for form in formats.formats}) == 5
    assert f2c.drawn("continents", 1, job)[0].formats != trained.formats


def test_the_formats_that_are_kept_leave_some_for_evaluation():
    for name, kept in KEPT.items():
        assert len(kept) == len({*kept}) >= f2c.TRAINED_FORMATS + 3 and max(kept) < len(SETS[name].formats)
        assert {len(form.answers) for form in SETS[name].formats} == {len(SETS[name].labels)}


def test_amplification_by_hand():
    true, before = np.array([0.5, 0.5]), np.array([0.7, 0.3])
    shares = {0.0: [0.7, 0.3], 1.0: [0.9, 0.1], -1.0: [0.5, 0.5], -2.0: [0.3, 0.7]}
    for value, after in shares.items():
        assert f2c_measures.amplification(before, np.array(after), true) == pytest.approx(value)


def test_controls_that_are_not_trained():
    scores = np.log(np.array([[[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]], [[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]]]))
    before, gold = {"train": scores, "test": scores}, {"train": np.array([1, 0]), "test": np.array([0, 0])}
    first = {part: table.argmax(-1) for part, table in before.items()}
    made = partial(f2c_measures.controlled, before=before, first=first, gold=gold, choices={"test": 2, "train": 2})
    assert made("untrained")["test"].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert made("vote")["test"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert made("calibrated")["test"].tolist() == [[1, 1, 1], [0, 0, 0]], "each format's surplus is taken away"
    assert made("constant predictor")["test"].tolist() == [[0, 0, 0], [0, 0, 0]]


def test_pooled_runs_and_relations_read_the_other_studies(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    for i, name in enumerate(f2c_when.NAMES):
        study = Study(name, ("f1",), "untrained", tmp_path / name)
        for seed in range(2):
            known = {"train_vote_gain": 0.1 * i, "train_vote_share": 1 - 0.1 * i, "train_vote_accuracy": (i % 2) / 10}
            study.record("untrained", seed, f1=0.5 + 0.01 * i + seed, **known)
            study.record("F2C", seed, f1=0.5 + 0.03 * i + seed)
    job = Job(tmp_path)
    assert f2c_when.pooled("F2C", 6, job)["f1"] == pytest.approx(1.56), "the third label set, its second seed"
    assert f2c_when.relation("gain of the vote", 1, job)["correlation"] == pytest.approx(1)
    assert f2c_when.relation("largest share of the vote", 0, job)["correlation"] == pytest.approx(-1)
    assert f2c_when.relation("no relation", 0, job) == {"correlation": 0}
    with pytest.raises(ValueError, match=r"no results of swarm with seed 0: run the plan f2c-continents"):
        f2c_when.pooled("swarm", 0, job)


def test_a_rate_is_chosen_by_the_sum_of_agreement_and_f1_of_all_its_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match=r"lacks runs of 'swarm': run the plan f2c-rates first"):
        f2c.best_rate("swarm")
    study = f2c.TUNING.study()
    for rate, sums in zip(f2c.RATES, ((1.0, 1.0), (0.9, 1.4), (1.2, 1.0)), strict=True):
        for seed, total in enumerate(sums):
            study.record(f"swarm {rate:g}", seed, sum=total)
    assert f2c.best_rate("swarm") == f2c.RATES[1]
    job = Job(tmp_path, tiny=True)
    row = f2c.tried("swarm 0.0003", 1, job)
    assert row["sum"] == row["agreement"] + row["f1"] and "task_f1" not in row

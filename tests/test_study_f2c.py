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
        free = ("amplification", "last_amplification", "selected_step")
        assert all(0 <= row[name] <= 1 for name in f2c.METRICS if name not in free)
        assert (row["selected_step"] in (1, 2)) == (arm in f2c.METHODS)
        assert row["train_vote_share"] == rows["untrained"]["train_vote_share"], "the same untrained model"
        assert ("consensus" in row) == (arm in f2c.METHODS)
    assert rows["untrained"]["amplification"] == 0
    assert rows["vote"]["agreement"] == rows["constant predictor"]["agreement"] == 1
    assert rows["vote"]["f1"] != rows["constant predictor"]["f1"] or rows["vote"]["largest_share"] == 1
    assert [file.name for file in job.work.glob("*.npz")] == ["untrained-continents-0.npz"]


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
    answers = lambda ones: np.arange(10).reshape(5, 2) < ones  # noqa: E731
    true, before = np.array([0, 0, 1, 1]), answers(3).astype(int)  # a surplus of 0.2 of label 0
    for value, ones in {0.0: 3, 1.0: 1, -1.0: 5, -2.0: 7}.items():
        assert f2c_measures.amplification(before, answers(ones).astype(int), true, 2) == pytest.approx(value)


def test_the_step_with_the_best_validation_f1_comes_back(found, monkeypatch):
    _, job = found
    model, tokenizer = f2c.load(job)
    evaluation = f2c.Evaluation("continents", 1, job, tokenizer)
    trainer = f2c.trainer_of("F2C", model, 1, job, evaluation.parts["train"], rate=1e-1)
    selection = f2c.Selection(trainer, evaluation.validation, (1, 2, 3))
    gold = np.array(evaluation.validation["gold"])
    seen, real = [], f2c.scored

    def right_at_the_second(trainer, rows):
        seen.append({name: p.detach().clone() for name, p in selection.adapter().items()})
        real(trainer, rows)
        share = {1: 0, 2: 1, 3: 0}[len(seen)]
        return np.eye(2)[np.repeat(gold if share else 1 - gold, 3).reshape(-1, 3)]

    monkeypatch.setattr(f2c, "scored", right_at_the_second)
    trainer.add_callback(selection)
    trainer.args.max_steps = 3
    trainer.train()
    selection.restore()
    assert (selection.step, selection.f1, len(seen)) == (2, 1.0, 3)
    now = selection.adapter()
    assert all((now[name] == value).all() for name, value in seen[1].items())
    assert any((now[name] != value).any() for name, value in seen[2].items())


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
            study.record("F2C", seed, f1=0.5 + 0.03 * i + seed, last_f1=0.5 + 0.03 * i + seed)
    job = Job(tmp_path)
    assert f2c_when.pooled("F2C", 6, job)["f1"] == pytest.approx(1.56), "the third label set, its second seed"
    assert f2c_when.relation("gain of the vote", 1, job)["correlation"] == pytest.approx(1)
    assert f2c_when.relation("largest share of the vote", 0, job)["correlation"] == pytest.approx(-1)
    assert f2c_when.relation("no relation", 0, job) == {"correlation": 0}
    with pytest.raises(ValueError, match=r"no results of swarm with seed 0: run the plan f2c-topics"):
        f2c_when.pooled("swarm", 0, job)

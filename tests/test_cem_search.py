"""Searches of real trainers: what a trial is trained with, resuming, several processes, and what is refused."""

import gc
import json

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from hf_xent import XentConfig, XentTrainer
from hf_xent.cem import Categorical, Integer, Real, search
from support.lines import FOLDER, Line, arguments, in_process, line, rows, trainer_of
from support.models import tiny, tiny_tokenizer

SPACE = {"learning_rate": Real(1e-3, 1.0, log=True), "num_train_epochs": Integer(1, 3)}


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Every training run begins with a garbage collection, which takes a second next to all that tests have loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


def of_optuna(trial):
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1.0, log=True),
        "num_train_epochs": trial.suggest_int("num_train_epochs", 1, 3),
        "lr_scheduler_type": trial.suggest_categorical("lr_scheduler_type", ["linear", "constant"]),
    }


def stored(folder):
    return json.loads((folder / "trials.json").read_text())["trials"]


def trained_by_hand(folder, parameters):
    trainer = trainer_of(folder, **parameters)
    trainer.train()
    return trainer.evaluate()["eval_loss"]


def test_trials_are_what_a_new_trainer_would_do(tmp_path):
    """Batch size, scheduler, optimizer and callbacks start anew, and the trainer is as before."""
    space = {**SPACE, "per_device_train_batch_size": Categorical([1, 4]), "lr_scheduler_type": Categorical(["cosine"])}
    trainer = trainer_of(tmp_path)
    before, batch = dict(vars(trainer.args)), trainer._train_batch_size
    best = search(trainer, space, budget=6, candidates=3)
    trials = stored(tmp_path)
    assert {trial["parameters"]["per_device_train_batch_size"] for trial in trials} == {1, 4}
    for trial in trials:
        assert trial["score"] == pytest.approx(trained_by_hand(tmp_path / "hand", trial["parameters"]), rel=1e-5)
    first = min(trials, key=lambda trial: trial["score"])
    assert (best.run_id, best.objective, best.hyperparameters) == (
        str(first["number"]), first["score"], first["parameters"],
    )  # fmt: skip
    assert type(best.hyperparameters["num_train_epochs"]) is int
    assert (vars(trainer.args), trainer._train_batch_size) == (before, batch)
    assert (type(trainer.args), trainer.model_init) == (TrainingArguments, line)
    assert best.run_summary == trials


def test_an_interrupted_search_continues(tmp_path, monkeypatch):
    whole = search(trainer_of(tmp_path / "whole"), of_optuna, budget=8, candidates=4)
    halted, train = trainer_of(tmp_path / "halted"), Trainer.train
    left = iter(range(6))

    def stopped(self, *args, **kwargs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return train(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        search(halted, of_optuna, budget=8, candidates=4)
    assert len(stored(tmp_path / "halted")) == 6
    assert type(halted.args) is TrainingArguments, "an interrupted trial restores the arguments, too"
    left = iter(range(2))  # what is missing, and no more
    assert search(trainer_of(tmp_path / "halted"), of_optuna, budget=8, candidates=4) == whole
    assert next(left, None) is None
    monkeypatch.setattr(Trainer, "train", None)  # a finished search trains nothing
    assert search(trainer_of(tmp_path / "halted"), of_optuna, budget=8, candidates=4) == whole
    for options, message in (
        ({"seed": 1}, "under seed 0, but this search has 1: choose another output folder"),
        ({"direction": "maximize"}, "under direction minimize"),
    ):
        with pytest.raises(ValueError, match=message):
            search(trainer_of(tmp_path / "halted"), of_optuna, budget=8, candidates=4, **options)
    with pytest.raises(ValueError, match="under arguments"):
        search(trainer_of(tmp_path / "halted", max_grad_norm=0.5), of_optuna, budget=8, candidates=4)


def test_scores_are_means_over_seeds(tmp_path):
    def noisy():
        model = Line()
        nn.init.normal_(model.weight)
        return model

    search(trainer_of(tmp_path, noisy), SPACE, budget=2, candidates=2, seeds=3)
    for trial in stored(tmp_path):
        scores = []
        for seed in (42, 43, 44):
            trainer = trainer_of(tmp_path / "hand", noisy, seed=seed, **trial["parameters"])
            trainer.train()
            scores.append(trainer.evaluate()["eval_loss"])
        assert trial["scores"] == pytest.approx(scores, rel=1e-5)
        assert trial["score"] == pytest.approx(sum(scores) / 3, rel=1e-5)


def test_largest_objective_and_parameters_of_the_model(tmp_path):
    seen = []

    def sized(trial):
        if trial is not None:
            seen.append((trial.number, trial["width"], trial.suggest_float("learning_rate", 0.1, 1)))
        return Line(1 if trial is None else trial["width"])

    def negative(metrics):
        return -metrics["eval_loss"]

    space = {"learning_rate": Real(0.1, 1), "width": Integer(1, 4)}
    best = search(trainer_of(tmp_path, sized), space, negative, budget=4, candidates=2, direction="maximize")
    trials = stored(tmp_path)
    assert best.objective == max(trial["score"] for trial in trials) < 0
    parameters = [trial["parameters"] for trial in trials]
    assert seen == [(k, p["width"], p["learning_rate"]) for k, p in enumerate(parameters)]


def test_checkpoints_and_counts_of_callbacks(tmp_path):
    """Early stopping counts anew in each trial; checkpoints are in run-k, with the arguments that can be read again."""
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    trainer = trainer_of(tmp_path, **options, num_train_epochs=4, learning_rate=0.0)
    trainer.add_callback(EarlyStoppingCallback(2))  # at a rate of almost zero it stops after three epochs
    search(trainer, {"learning_rate": Real(1e-12, 1e-11)}, budget=2, candidates=2)
    for run in ("run-0", "run-1"):
        assert sorted(path.name for path in (tmp_path / run).iterdir()) == [f"checkpoint-{k}" for k in (1, 2, 3)]
        args = torch.load(tmp_path / run / "checkpoint-1" / "training_args.bin", weights_only=False)
        assert (type(args), args.output_dir) == (TrainingArguments, str(tmp_path / run))


def failing(trial):
    if trial is not None and trial["num_train_epochs"] < 2:
        raise RuntimeError("out of memory")
    return Line()


def test_trials_that_fail_are_the_worst(tmp_path, capsys):
    best = search(trainer_of(tmp_path, failing), SPACE, budget=6, candidates=6)
    trials = stored(tmp_path)
    assert best.hyperparameters["num_train_epochs"] > 1
    assert {trial["error"] for trial in trials} == {None, "RuntimeError: out of memory"}
    assert [trial["score"] is None for trial in trials] == [t["parameters"]["num_train_epochs"] < 2 for t in trials]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert any("failed: RuntimeError: out of memory" in text for text in lines)


def test_a_score_that_is_nan_is_a_failure(tmp_path):
    with pytest.raises(ValueError, match=r"all 2 trials failed, the first with the score is \[nan\]: see"):
        search(trainer_of(tmp_path), SPACE, lambda metrics: float("nan"), budget=4, candidates=2)


def nameless(trial):
    return {"learning": trial.suggest_float("learning", 0, 1)}


def test_what_cannot_be_searched_is_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    plain = Trainer(Line(), arguments(tmp_path), train_dataset=rows(), eval_dataset=rows())
    unevaluated = Trainer(args=arguments(tmp_path), model_init=line, train_dataset=rows())
    several = {"a": rows(), "b": rows()}
    of_two = Trainer(args=arguments(tmp_path), model_init=line, train_dataset=rows(), eval_dataset=several)
    for arguments_, options, message in (
        ((trainer, nameless), {}, "learning is no field of TrainingArguments"),
        ((trainer, {"label_smoothing_factor": Real(0, 1)}), {}, "label_smoothing_factor had no effect on a trial"),
        ((trainer, lambda trial: trial.suggest_int("seed", 1, 9) and None), {}, "hp_space returns None"),
        ((trainer, {"seed": Integer(1, 9)}), {"seeds": 2}, "seeds is 2, but seed is searched"),
        ((trainer, SPACE), {"processes": 2}, "a trainer cannot be sent to them: pass a function"),
        ((lambda: trainer, SPACE), {"processes": 2}, "define it at the top level of a module"),
        ((lambda trial: trainer, SPACE), {}, "output is None"),
        ((trainer, SPACE), {"budget": 1}, "budget is 1: choose a whole number of at least 2"),
        ((trainer, SPACE), {"seeds": 0}, "seeds is 0"),
        ((trainer, {"lr_scheduler_type": Categorical(["none"])}), {}, "none is not a valid SchedulerType"),
        ((plain, SPACE), {}, "trainer has no model_init"),
        ((unevaluated, SPACE), {}, "trainer has no eval_dataset"),
        ((of_two, SPACE), {}, "the evaluation has no eval_loss but"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            search(*arguments_, **{"budget": 2, "candidates": 2, **options})
        assert "\n" not in str(error.value)
        (tmp_path / "trials.json").unlink(missing_ok=True)
    with pytest.raises(TypeError, match="trainer is a list: give a Trainer, or a function that makes one"):
        search([trainer], SPACE)
    assert trainer.args == trainer_of(tmp_path).args, "also after trials that failed"
    (tmp_path / "trials.json").write_text("{")
    with pytest.raises(ValueError, match="holds no trials of a search"):
        search(trainer, SPACE, budget=2, candidates=2)


# trainers that a function makes


def texts():
    return Dataset.from_dict({"input_ids": [[3, 4, 5, 6], [5, 6, 7, 3]], "labels": [[3, 4, 5, 6], [5, 6, 7, 3]]})


@pytest.fixture(scope="module")
def sft():
    from trl import SFTConfig, SFTTrainer

    def make(folder, **options):
        return SFTTrainer(
            tiny(),
            arguments(folder, SFTConfig, max_length=8, gradient_checkpointing=False, **options),
            train_dataset=Dataset.from_dict({"input_ids": [[3, 4, 5, 6], [5, 6, 7, 3]]}),
            eval_dataset=Dataset.from_dict({"input_ids": [[3, 4, 5, 6]]}),
            processing_class=tiny_tokenizer(),
        )

    return make


def xent(folder, **options):
    return XentTrainer(tiny(), arguments(folder, XentConfig, **options), train_dataset=texts(), eval_dataset=texts())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["xent", "sft"])
def test_trainers_of_language_models(kind, tmp_path, request, without_progress_bars):
    make = xent if kind == "xent" else request.getfixturevalue("sft")
    space = {"learning_rate": Real(1e-3, 1e-1, log=True), "per_device_train_batch_size": Categorical([1, 2])}
    best = search(lambda: make(tmp_path), space, budget=2, candidates=2)
    torch.manual_seed(0)
    by_hand = make(tmp_path / "hand", **best.hyperparameters)
    by_hand.train()
    assert best.objective == pytest.approx(by_hand.evaluate()["eval_loss"], rel=1e-4)


def test_options_that_are_read_when_the_trainer_is_made(tmp_path):
    space = {"loss": Categorical(["focal:gamma=2", "cross_entropy"]), "learning_rate": Real(1e-2, 1e-1)}
    best = search(lambda trial: xent(tmp_path, **trial), space, budget=4, candidates=4, output=tmp_path / "out")
    trials = stored(tmp_path / "out")
    assert {trial["parameters"]["loss"] for trial in trials} == {"focal:gamma=2", "cross_entropy"}
    assert best.objective == min(trial["score"] for trial in trials)
    with pytest.raises(ValueError, match="loss had no effect on a trial: it is read when the trainer is made"):
        search(lambda: xent(tmp_path), {"loss": Categorical(["cross_entropy"])}, budget=2, candidates=2)


@pytest.mark.slow
def test_two_processes(tmp_path, monkeypatch):
    """They find what one finds; a process that dies costs its trial."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    space = {"learning_rate": Real(1e-2, 1.0, log=True), "gradient_accumulation_steps": Integer(1, 3)}
    search(in_process, space, budget=4, candidates=4, processes=2, seed=6)
    trials = stored(tmp_path)
    assert [trial["parameters"]["gradient_accumulation_steps"] == 2 for trial in trials] == [True, False, False, False]
    for trial in trials:
        if trial["parameters"]["gradient_accumulation_steps"] == 2:
            assert (trial["score"], "exit code 3" in trial["error"]) == (None, True)
        else:
            assert trial["score"] == pytest.approx(trained_by_hand(tmp_path / "hand", trial["parameters"]), rel=1e-5)

"""Trackers get what trainers log: trackio's database and TensorBoard's files have the numbers of `log_history`."""

import os
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_xent import NoiseFiTConfig, NoiseFiTTrainer, SPOConfig, SPOTrainer, XentConfig, XentTrainer
from support import preferences
from support.models import tiny, tiny_tokenizer

pytest.importorskip("tensorboard", reason="pip install -e .[dev]")
SUMMARY = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"}
OWN = {"step", *SUMMARY}


@pytest.fixture(scope="module")
def trackio():
    """trackio with the database of the tests (tests/conftest.py)."""
    module = pytest.importorskip("trackio", reason="pip install -e .[dev]")
    assert str(module.utils.TRACKIO_DIR) == os.environ["TRACKIO_DIR"]
    return module


def options(folder, monkeypatch, name):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
    return {
        "report_to": ["trackio", "tensorboard"], "run_name": name, "project": "tests", "eval_strategy": "steps",
        "eval_steps": 2, "logging_steps": 1, "max_steps": 4, "per_device_train_batch_size": 2, "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip


def noisefit(folder, given):
    return xent(folder, {**given, "num_noise_layers": 1}, NoiseFiTTrainer, NoiseFiTConfig)


def xent(folder, given, kind=XentTrainer, config=XentConfig):
    rows = Dataset.from_dict({"input_ids": torch.randint(3, 97, (8, 6)).tolist()})
    rows = rows.map(lambda row: {"labels": row["input_ids"]})
    args = config(output_dir=str(folder), **given)
    return kind(tiny(), args, train_dataset=rows, eval_dataset=rows)


def spo(folder, given):
    args = SPOConfig(str(folder), **given, bf16=False, seed=0)
    return SPOTrainer(
        tiny(), tiny(), args, train_dataset=preferences.table(), eval_dataset=preferences.table(),
        processing_class=tiny_tokenizer(),
    )  # fmt: skip


def expected(trainer):
    """Name as trackers have it -> (step, value), in the order in which they were logged."""
    found = {}
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            if key not in OWN:
                name = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
                found.setdefault(name, []).append((entry["step"], value))
    return found


def in_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "events"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def in_trackio(trackio, name):
    from trackio.sqlite_storage import SQLiteStorage

    trackio.finish()  # writes what waits
    found = {}
    for entry in SQLiteStorage.get_logs("tests", name):
        for key, value in entry.items():
            if key not in ("step", "timestamp"):
                found.setdefault(key, []).append((entry["train/global_step"], value))
    return found


MEANS = {
    "xent": {"train/loss", "train/perplexity", "train/mean_token_accuracy", "train/entropy", "train/grad_norm",
             "train/learning_rate", "eval/loss", "eval/perplexity", "eval/mean_token_accuracy", "eval/entropy"},
    "noisefit": {"train/loss", "train/divergence", "train/entropy", "eval/perplexity"},
    "spo": {"train/loss", "train/rewards/margins", "eval/loss", "eval/rewards/accuracies"},
}  # fmt: skip


@pytest.mark.parametrize(("name", "make"), [("xent", xent), ("noisefit", noisefit), ("spo", spo)])
def test_trackers_have_what_the_trainer_logs(trackio, tmp_path, monkeypatch, name, make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make(tmp_path, options(tmp_path, monkeypatch, name))
        trainer.train()
        trainer.evaluate()  # the run goes on under its name
    logged, events, tracked = expected(trainer), in_tensorboard(tmp_path), in_trackio(trackio, name)
    assert MEANS[name] <= {*logged} and len(logged["eval/loss"]) == 3
    for key, points in logged.items():
        assert np.array(events[key]) == pytest.approx(np.array(points), rel=1e-6), key  # float32 in its files
        assert np.array(tracked[key]) == pytest.approx(np.array(points), rel=1e-12), key

"""CurveCallback: the losses and learning rates of every step, under accumulation, over ranks, and after a resume."""

import csv
import json
import shutil

import datasets
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler

import hf_xent
from hf_xent.callbacks.curve import COLUMNS, CurveCallback
from support.models import tiny, tiny_tokenizer
from support.ranks import run_ranks

TEXTS = ["the quick brown fox", "jumps over", "the lazy dog the quick", "fox over the dog"] * 4


class Rows(torch.utils.data.Dataset):
    """Sequences of unequal lengths."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        ids = torch.arange(3, 8 + 5 * i % 7) + i
        return {"input_ids": ids, "labels": ids.clone()}


def collate(rows):
    pad = lambda key, value: torch.nn.utils.rnn.pad_sequence([r[key] for r in rows], True, value)  # noqa: E731  one line
    padded = {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}
    return padded | {"attention_mask": (padded["labels"] != -100).long()}


def arguments(folder, kind=TrainingArguments, **options):
    common = {
        "max_steps": 6, "per_device_train_batch_size": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-2, "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
    }  # fmt: skip
    return kind(str(folder), **common | options)


def train(folder, kind=Trainer, every=50, model=None, resume=None, callbacks=(), **options):
    """The trainer and the rows of the file."""
    shape = hf_xent.XentConfig if kind is hf_xent.XentTrainer else TrainingArguments
    found = kind(
        model or tiny(), arguments(folder, shape, **options), train_dataset=Rows(), data_collator=collate,
        callbacks=[CurveCallback(folder / "curve.csv", every), *callbacks],
    )  # fmt: skip
    found.train(resume_from_checkpoint=resume)
    return found, rows(folder / "curve.csv")


def rows(path):
    with path.open() as file:
        assert file.readline().startswith("# {")
        found = list(csv.DictReader(file))
    assert [*found[0]] == list(COLUMNS)
    return found


def column(found, name):
    return [float(row[name]) for row in found]


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("kind", [Trainer, hf_xent.XentTrainer])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_row_is_what_logging_every_step_logs(tmp_path, kind, accumulated):
    trainer, found = train(tmp_path, kind, gradient_accumulation_steps=accumulated)
    assert column(found, "step") == [1, 2, 3, 4, 5, 6]
    assert column(found, "loss") == logged(trainer) and len(set(logged(trainer))) == 6
    assert column(found, "lr") == logged(trainer, "learning_rate")
    assert {int(row["params"]) for row in found} == {trainer.model.num_parameters()}
    assert "training_step" not in vars(trainer)


def test_rates_are_those_of_the_scheduler_and_logging_changes_nothing(tmp_path):
    _, every = train(tmp_path / "every")
    _, rare = train(tmp_path / "rare", every=4, logging_steps=5)
    assert rare == every
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    scheduler, expected = get_scheduler("cosine", optimizer, 2, 6), []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), scheduler.step()
    assert column(every, "lr") == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert expected[0] == 0 and max(expected) == 1e-2


def test_tokens_are_those_of_the_input_without_padding(tmp_path):
    trainer, found = train(tmp_path, include_num_input_tokens_seen="non_padding", gradient_accumulation_steps=2)
    assert column(found, "tokens") == logged(trainer, "num_input_tokens_seen")[: len(found)]


def test_the_first_line_tells_the_run(tmp_path):
    trainer, _ = train(tmp_path, gradient_accumulation_steps=3, seed=5)
    with (tmp_path / "curve.csv").open() as file:
        run = json.loads(file.readline()[2:])
    assert run == {
        "model": "LlamaForCausalLM", "batch": 6, "schedule": "cosine", "schedule_options": {}, "learning_rate": 1e-2,
        "warmup_steps": 2, "max_steps": 6, "seed": 5, "params": trainer.model.num_parameters(),
    }  # fmt: skip


class Stop(TrainerCallback):
    """An interruption after a step, as an error in it is."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise InterruptedError


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A folder with a checkpoint of step 2 and rows up to step 3; and the rows of a run without interruption."""
    folder = tmp_path_factory.mktemp("interrupted")
    _, whole = train(folder / "whole")
    with pytest.raises(InterruptedError):
        train(folder / "cut", every=1, save_strategy="steps", save_steps=2, callbacks=[Stop(3)])
    assert column(rows(folder / "cut" / "curve.csv"), "step") == [1, 2, 3]
    return folder / "cut", whole


@pytest.fixture
def cut(interrupted, tmp_path):
    shutil.copytree(interrupted[0], tmp_path / "cut")
    return tmp_path / "cut", interrupted[1]


def test_a_resumed_curve_equals_an_uninterrupted_one(cut):
    folder, whole = cut
    with (folder / "curve.csv").open("a") as file:
        file.write("4,0.0")  # the process died within a row
    _, found = train(folder, save_strategy="steps", save_steps=2, resume=True)
    assert found == whole


def test_a_file_of_another_run_is_refused_and_kept(cut):
    folder, _ = cut
    before = (folder / "curve.csv").read_text()
    with pytest.raises(ValueError, match=r"the curve of another run, with learning_rate=0\.01, not 0\.02"):
        train(folder, learning_rate=2e-2)
    with pytest.raises(ValueError, match="the curve of another run, with seed=42, not 7"):
        train(folder, seed=7)
    assert (folder / "curve.csv").read_text() == before


def test_a_file_that_lacks_steps_is_refused(cut):
    folder, _ = cut
    lines = (folder / "curve.csv").read_text().splitlines(keepends=True)
    for kept in (lines[:3], [*lines[:2], *lines[3:]]):
        (folder / "curve.csv").write_text("".join(kept))
        with pytest.raises(ValueError, match="does not have all steps before the checkpoint of step 2"):
            train(folder, resume=True)
    (folder / "curve.csv").unlink()
    with pytest.raises(ValueError, match="does not have all steps"):
        train(folder, resume=True)


def test_a_finished_curve_is_kept_and_an_unfinished_one_begins_anew(cut):
    folder, whole = cut
    _, found = train(folder)
    assert found == whole
    with pytest.raises(ValueError, match="the curve of a finished run: choose another file"):
        train(folder)
    (folder / "curve.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="which is no curve of this callback"):
        train(folder)
    assert (folder / "curve.csv").read_text() == "step,loss\n1,2\n"


def test_rows_are_written_before_a_checkpoint_is(tmp_path):
    class Looks(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append(len(rows(tmp_path / "curve.csv")))

    seen = []
    train(tmp_path, save_strategy="steps", save_steps=2, callbacks=[Looks()])
    assert seen == [2, 4, 6]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL passes transformers' options by names of before v6
def test_in_trl_s_trainer(tmp_path, without_progress_bars):
    import trl

    config = arguments(tmp_path, trl.SFTConfig, bf16=False, max_length=16)
    data = datasets.Dataset.from_dict({"text": TEXTS})
    callback = CurveCallback(tmp_path / "curve.csv")
    trainer = trl.SFTTrainer(
        tiny(), config, train_dataset=data, processing_class=tiny_tokenizer(), callbacks=[callback]
    )
    trainer.train()
    found = rows(tmp_path / "curve.csv")
    assert column(found, "loss") == logged(trainer) and column(found, "lr") == logged(trainer, "learning_rate")
    assert int(found[-1]["tokens"]) == logged(trainer, "num_tokens")[-1]


def test_options_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="every is 0: give a positive number"):
        CurveCallback(tmp_path / "curve.csv", every=0)
    with pytest.raises(RuntimeError, match=r"was not called by a transformers\.Trainer"):
        CurveCallback(tmp_path / "curve.csv").on_train_begin(None, None, None)


def on_a_rank(rank, folder):
    from pathlib import Path

    trainer, _ = train(Path(folder), gradient_accumulation_steps=2, max_steps=3)
    return logged(trainer), type(trainer.model_wrapped).__name__


@pytest.mark.slow
def test_losses_are_means_over_ranks(tmp_path):
    ranks = run_ranks(2, on_a_rank, tmp_path, str(tmp_path))
    losses, wrapped = ranks[0]
    assert wrapped == "DistributedDataParallel"
    assert column(rows(tmp_path / "curve.csv"), "loss") == losses
    _, alone = train(tmp_path / "alone", per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3)
    assert int(rows(tmp_path / "curve.csv")[-1]["tokens"]) == int(alone[-1]["tokens"])

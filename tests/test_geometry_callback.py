"""GeometryCallback in transformers' and TRL's trainers: what it measures, when, that it changes nothing, and resume."""

import csv
import runpy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_xent.callbacks.geometry import GeometryCallback
from hf_xent.experiments.geometry import read_curve
from hf_xent.metrics.geometry import MEASURES, measures
from hf_xent.models.features import Documents
from support.models import V, tiny, tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore:features have 32 columns")  # the tiny model's width, which is told

DOCUMENTS = [torch.randint(3, V, (2 + i % 7,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(64)]
ROWS = Dataset.from_list([{"input_ids": row, "labels": row} for row in torch.arange(3, 83).view(10, 8).tolist()])


def fit(folder, callback=None, *, resume=None, model=None, **options):
    """A trainer of a model with dropout, after its training."""
    model = tiny("gpt2", resid_pdrop=0.3) if model is None else model
    config = TrainingArguments(
        str(folder), per_device_train_batch_size=2, learning_rate=1e-2, report_to="none", use_cpu=True, logging_steps=1,
        **{"max_steps": 6, "save_strategy": "no"} | options,
    )  # fmt: skip
    trainer = Trainer(model, config, train_dataset=ROWS, callbacks=[callback] if callback else None)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_measures_go_to_the_history_and_a_file(tmp_path):
    callback = GeometryCallback(DOCUMENTS, layers=(-1, 1), batch_size=9)
    trainer = fit(tmp_path, callback)
    assert [(row["step"], row["layer"]) for row in callback.rows] == [(s, k) for s in (0, 1, 2, 4, 6) for k in (-1, 1)]
    assert [row["tokens"] for row in callback.rows[::2]] == [0, 16, 32, 64, 96]
    states = [batch[-1] for batch in Documents(DOCUMENTS).features(trainer.model)]
    expected = measures(torch.cat(states))
    assert {name: callback.rows[-2][name] for name in MEASURES} == pytest.approx(expected, rel=1e-4)
    logged = [entry for entry in trainer.state.log_history if "geometry_rankme" in entry]
    assert [entry["geometry_rankme"] for entry in logged] == [row["rankme"] for row in callback.rows]
    curve = read_curve(tmp_path / "geometry.csv", layer=1)
    assert curve["step"].tolist() == [0, 1, 2, 4, 6] and curve["alpha"][0] == callback.rows[1]["alpha"]
    assert trainer.args.include_num_input_tokens_seen == "no", "as it was"
    assert losses(trainer) == losses(fit(tmp_path / "alone")), "the training is the same as without"


def test_a_number_of_steps_and_standard_deviations(tmp_path):
    callback = GeometryCallback(DOCUMENTS, every=3, resamples=4, file=tmp_path / "curves" / "a.csv")
    fit(tmp_path, callback, include_num_input_tokens_seen="all")
    assert [row["step"] for row in callback.rows] == [0, 3, 6]
    assert all(row["rankme_sd"] > 0 for row in callback.rows) and (tmp_path / "curves" / "a.csv").exists()


def test_resumed_training_goes_on(tmp_path):
    """Stopped after step 5 with a checkpoint of step 4: the rows are those of a run that was not stopped."""
    whole = GeometryCallback(DOCUMENTS, every=1, resamples=2)
    fit(tmp_path / "whole", whole)
    first = GeometryCallback(DOCUMENTS, every=1, resamples=2)
    fit(tmp_path / "run", first, max_steps=5, save_strategy="steps", save_steps=4, lr_scheduler_type="constant")
    assert len(read_curve(tmp_path / "run" / "geometry.csv")["step"]) == 6
    second = GeometryCallback(DOCUMENTS, every=1, resamples=2)
    checkpoint = str(tmp_path / "run" / "checkpoint-4")
    fit(tmp_path / "run", second, resume=checkpoint, model=tiny("gpt2", resid_pdrop=0.3))
    assert [row["step"] for row in second.rows] == list(range(7)) and second.rows[:5] == first.rows[:5]
    assert [row["tokens"] for row in second.rows] == [row["tokens"] for row in whole.rows]
    assert second.rows[5]["rankme"] != whole.rows[5]["rankme"], "the schedules differ"
    with (tmp_path / "run" / "geometry.csv").open() as file:
        assert [float(row["rankme"]) for row in csv.DictReader(file)] == [row["rankme"] for row in second.rows]


def test_another_training_keeps_the_file(tmp_path):
    for _ in range(3):
        fit(tmp_path, GeometryCallback(DOCUMENTS), max_steps=1)
    assert sorted(path.name for path in tmp_path.glob("*.csv")) == ["geometry-1.csv", "geometry-2.csv", "geometry.csv"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL passes transformers' options by names of before v6
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_trl_trainers(tmp_path, method):
    """Texts are read by the trainer's own tokenizer, whatever side it pads on, and tokens are counted."""
    import trl

    texts = [f"the {word} dog" for word in ("quick", "brown", "lazy", "over")]
    options = {"output_dir": str(tmp_path), "max_steps": 2, "report_to": "none", "use_cpu": True, "bf16": False}
    options |= {"per_device_train_batch_size": 2, "gradient_checkpointing": False, "save_strategy": "no"}
    callback = GeometryCallback([f"{a} {b}" for a in texts for b in texts for _ in range(4)])
    parts = {"processing_class": tiny_tokenizer(), "callbacks": [callback]}
    if method == "sft":
        rows = Dataset.from_dict({"text": texts})
        trainer = trl.SFTTrainer(tiny(), trl.SFTConfig(**options), train_dataset=rows, **parts)
    else:
        rows = Dataset.from_dict({"prompt": ["the"] * 4, "chosen": texts, "rejected": texts[::-1]})
        trainer = trl.DPOTrainer(tiny(), tiny(), args=trl.DPOConfig(**options), train_dataset=rows, **parts)
    trainer.train()
    assert [row["step"] for row in callback.rows] == [0, 1, 2] and callback.rows[-1]["documents"] == 64
    assert 0 < callback.rows[1]["tokens"] < callback.rows[2]["tokens"]
    states = [batch[-1] for batch in callback.documents.features(trainer.model)]
    assert callback.rows[-1]["rankme"] == pytest.approx(measures(torch.cat(states))["rankme"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"every": "often"}, "every is 'often': choose a number of steps, or 'doubling'"),
        ({"resamples": 1}, "resamples is 1"),
        ({"texts": Documents(DOCUMENTS), "max_length": 3}, "texts are Documents: set max_length on them"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GeometryCallback(**{"texts": DOCUMENTS} | options)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (GeometryCallback(DOCUMENTS, layers=(5,)), r"layers is \(5,\)"),
        (GeometryCallback(["the dog"] * 30), "texts need a tokenizer"),
        (GeometryCallback(DOCUMENTS[:20]), "so 19 ranks"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_training(tmp_path, callback, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, callback)


def test_weights_in_parts_are_refused(tmp_path):
    model = tiny("gpt2")
    model.lm_head.weight.ds_id = 0  # as ZeRO-3 marks them
    with pytest.raises(ValueError, match="GPT2LMHeadModel whose weights are split over processes"):
        fit(tmp_path, GeometryCallback(DOCUMENTS), model=model)


def example(name, monkeypatch):
    """A script among the examples, which import one another."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.mark.filterwarnings("ignore:documents number", "ignore:features have 24")  # enough for a test
def test_the_example_of_pretraining_draws_both_arms(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    for i in range(50):
        (tmp_path / "text" / f"{i}.txt").write_text("the quick brown fox jumps over the lazy dog again. "[i % 9 :] * 9)
    script = example("geometry_pretraining", monkeypatch)
    small = {"SIZE": {"n_layer": 1, "n_embd": 24, "n_head": 2}, "CONTEXT": 32, "LENGTH": 8, "ROWS": 2, "RESAMPLES": 2}
    for name, value in small.items():
        monkeypatch.setitem(script["main"].__globals__, name, value)
    monkeypatch.setitem(script["train_tokenizer"].__globals__, "VOCABULARY", 270)
    found = script["main"](text=str(tmp_path / "text"), steps=3, seeds=1, output=tmp_path / "out")
    assert set(found) == {script["TEXT"], script["CONTROL"]}
    curves = [read_curve(tmp_path / "out" / arm / "seed-0" / "geometry.csv") for arm in found]
    assert all(curve["tokens"].tolist() == [0, 64, 128, 192] for curve in curves)
    assert curves[0]["rankme"][0] == curves[1]["rankme"][0] and curves[0]["rankme"][3] != curves[1]["rankme"][3]
    assert "| text | 0 |" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "curves.png").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:documents number", "ignore::FutureWarning")  # TRL passes old names of options
def test_the_example_of_tuning_compares_labels_with_shuffled_ones(tmp_path, monkeypatch):
    tiny(std=0.05, vocab_size=90, num_hidden_layers=3, max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    script = example("geometry_tuning", monkeypatch)
    for name, value in {"DOCUMENTS": 32, "LENGTH": 6, "RESAMPLES": 2}.items():
        monkeypatch.setitem(script["main"].__globals__, name, value)
    found = script["main"](model=str(tmp_path / "model"), steps=2, seeds=1, output=tmp_path / "out")
    assert set(found) == {"SFT", "DPO"} and all(set(arms) == {"labels", "shuffled labels"} for arms in found.values())
    rows = [arms[arm][0] for arms in found.values() for arm in arms]
    assert all(row["RankMe change"] != 0 and row["RankMe change (sd)"] > 0 for row in rows)
    assert len({row["RankMe before"] for row in rows}) == 1, "the model before is the same"
    assert "- shuffled labels, seed 0: RankMe" in (tmp_path / "out" / "DPO" / "README.md").read_text()


def test_shuffled_labels_are_the_same_rows(monkeypatch):
    script = example("shuffled_labels", monkeypatch)
    plain, mixed = (script["answers"](40, 0, shuffled) for shuffled in (False, True))
    assert plain["prompt"][:] == mixed["prompt"][:] and sorted(plain["completion"]) == sorted(mixed["completion"])
    assert plain["completion"][:] != mixed["completion"][:]
    plain, mixed = (script["preferences"](40, 0, shuffled) for shuffled in (False, True))
    swapped = [a == b for a, b in zip(plain["chosen"], mixed["rejected"], strict=True)]
    assert 8 < sum(swapped) < 32
    assert [{a, b} for a, b in zip(plain["chosen"], plain["rejected"], strict=True)] == [
        {a, b} for a, b in zip(mixed["chosen"], mixed["rejected"], strict=True)
    ]

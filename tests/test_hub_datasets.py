"""Exported data sets have what the Hub's viewer reads: configurations, columns, splits; as `datasets` pushes them."""

import json

import datasets
import pytest
import yaml

from hf_xent import hub
from hf_xent.hub.datasets import export, size_of
from support.hub_process import elsewhere
from support.models import tiny, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("without_progress_bars")
SIZES = {"n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M"}  # of the Hub, as far as they are used


def made(count):
    return [{"text": f"发明 {i}", "label": i % 2} for i in range(count)]


@pytest.fixture
def patents(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made(6)))
    return export("patentmia", tmp_path / "out", tmp_path / "rows.jsonl")


def head_of(folder):
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])


def features_in(folder):
    """The columns by a file of rows alone."""
    for file in folder.rglob("*.parquet"):
        return datasets.Dataset.from_parquet(str(file)).features
    return datasets.Dataset.from_file(str(next(folder.rglob("*.arrow")))).features


def check(folder):
    """The front matter against what `datasets` finds in the files, streaming too; returns it."""
    head = head_of(folder)
    hub.validate(folder, "dataset")
    info = head["dataset_info"]
    assert head["size_categories"] in SIZES or head["size_categories"][0] in SIZES
    assert head["license"] and head["task_categories"] and head["configs"][0]["config_name"] == "default"
    builder = datasets.load_dataset_builder(str(folder))
    assert builder.info.features == features_in(folder), "which the files have too, without the card"
    loaded = datasets.load_dataset(str(folder))
    sizes = {split["name"]: (split["num_examples"], split["num_bytes"]) for split in info["splits"]}
    assert sizes == {name: (len(rows), rows.data.nbytes) for name, rows in loaded.items()}
    assert info["dataset_size"] == sum(split["num_bytes"] for split in info["splits"])
    for split, rows in loaded.items():
        assert rows.features == builder.info.features
        assert list(datasets.load_dataset(str(folder), split=split, streaming=True)) == rows.to_list()
    return head


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # streams of `datasets` leave files to the collector
@pytest.mark.parametrize("name", ["patentmia", "pydoc"])
def test_a_viewer_finds_columns_and_splits(name, tmp_path, request):
    folder = request.getfixturevalue("patents") if name == "patentmia" else export(name, tmp_path / "out")
    head = check(folder)
    names = sorted(file.name for file in (folder / "data").iterdir())
    assert names == sorted(f"{split['name']}-00000-of-00001.parquet" for split in head["dataset_info"]["splits"])
    if name == "patentmia":
        (label,) = [column for column in head["dataset_info"]["features"] if column["name"] == "label"]
        assert label["dtype"] == {"class_label": {"names": {"0": "non-member", "1": "member"}}}
        assert head["language"] == "zh" and head["size_categories"] == "n<1K"


@pytest.mark.parametrize(("rows", "name"), [(999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M")])
def test_sizes_have_the_names_of_the_hub(rows, name):
    assert size_of(rows) == name in SIZES


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_cache_of_a_teacher_is_a_dataset(tmp_path, monkeypatch):
    from hf_xent import teachers
    from hf_xent.experiments.distill_cache import card
    from hf_xent.teachers.tokens import tokenized
    from hf_xent.teachers.writing import write_cache

    tokenizer = tiny_tokenizer()
    rows = tokenized(datasets.Dataset.from_dict({"text": ["the quick brown fox", "the dog"]}), tokenizer)
    found = write_cache(teachers.load(tiny(std=0.05)), rows, tmp_path / "cache", tokenizer=tokenizer, k=3)
    (tmp_path / "cache" / "README.md").write_text(card(found, hub.render))
    head = check(tmp_path / "cache")
    assert head["dataset_info"]["features"][0]["name"] == "input_ids"
    text = (tmp_path / "cache" / "README.md").read_text()
    monkeypatch.chdir(tmp_path / "cache")
    names = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert len(names["teacher"].rows) == 2


# --- beside `Dataset.push_to_hub`, on one Hub


@pytest.fixture(scope="module", name="elsewhere")
def _elsewhere(tmp_path_factory):
    with elsewhere(tmp_path_factory.mktemp("home")) as found:
        yield found


def push_both(folder):
    """Ours as a folder, theirs from the rows; what `load_dataset` then finds in both, and streams."""
    datasets.disable_progress_bars()
    hub.push(folder, "me/ours", repo_type="dataset")
    datasets.load_dataset(str(folder)).push_to_hub("me/theirs")
    found = []
    for repo in ("me/ours", "me/theirs"):
        parts = datasets.load_dataset(repo)
        stream = list(datasets.load_dataset(repo, split="train", streaming=True))
        found.append(({k: v.to_list() for k, v in parts.items()}, str(parts["train"].features), stream))
    return found


@pytest.mark.slow  # a process of its own
def test_a_push_is_that_of_datasets(elsewhere, patents):
    ours, theirs = elsewhere.run(push_both, patents)
    assert ours == theirs and ours[2] == ours[0]["train"] and len(ours[2]) == 6
    heads = []
    for repo in ("me/ours", "me/theirs"):
        files = elsewhere.files(repo, "datasets")
        heads.append(yaml.safe_load(files["README.md"].decode().split("---")[1]))
        assert [name for name in files if name.endswith(".parquet")] == ["data/train-00000-of-00001.parquet"]
    for key in ("features", "splits", "dataset_size"):
        assert heads[0]["dataset_info"][key] == heads[1]["dataset_info"][key], key
    assert heads[0]["configs"] == heads[1]["configs"]

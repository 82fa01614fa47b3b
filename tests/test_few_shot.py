"""The examples of RePRI, on stand-ins of their data: all arms in one seed, and nothing is run twice."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertModel

from support.models import tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]


def ran(name, folder, *arguments, **options):
    """The results of an example, whose arms all have them on disk and in the card."""
    example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    found = example["main"](*arguments, seeds=1, output=folder, **options)
    assert found.keys() == example["ARMS"].keys()
    assert json.loads((folder / "results.json").read_text())["results"].keys() == found.keys()
    assert all(f"| {arm} |" in (folder / "README.md").read_text() for arm in found)
    assert all(0 <= rows[0][metric] <= 1 for rows in found.values() for metric in example["METRICS"])
    assert example["main"](*arguments, seeds=1, output=folder, **options) == found
    return {arm: rows[0] for arm, rows in found.items()}, example


def test_names_from_a_few_sentences(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    BertModel(BertConfig(vocab_size=90, **sizes)).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer(" ".join(WORDS)).save_pretrained(tmp_path / "encoder")
    tags = {"fox": "np", "dog": "np-tl"}
    draw = np.random.default_rng(0)
    lines = [" ".join(f"{w}/{tags.get(w, 'nn')}" for w in draw.permutation(WORDS)) for _ in range(90)]
    (tmp_path / "ca01").write_text("\n".join([*lines, "short/nn"]))
    found, example = ran("few_shot_tags", tmp_path / "out", f"brown:{tmp_path}", str(tmp_path / "encoder"), episodes=2)
    rows = example["sentences"]("", "", tmp_path / "out")
    assert len(rows) == 90 and all(len(f) == len(names) == len(WORDS) for f, names in rows)
    assert sum(int(names.sum()) for _, names in rows) == 2 * 90, "also of np-tl"
    support, query = example["episode"](rows, 5, np.random.default_rng(0))
    assert len(support[0]) == 5 * len(WORDS) and len(query[1]) == 32 * len(WORDS)
    assert len({row["F1, 5"] for row in found.values()}) > 2, "arms differ"


@pytest.fixture
def digits(monkeypatch):
    """Squares on noise, 32 x 32 pixels, of ten labels."""
    draw, rows = np.random.default_rng(0), {"image": [], "mask": [], "label": []}
    for i in range(60):
        mask = np.zeros((32, 32), np.uint8)
        y, x = draw.integers(20, size=2)
        mask[y : y + 10, x : x + 10] = 1
        rows["image"].append((draw.integers(80, size=mask.shape) + 150 * mask).tolist())
        rows["mask"].append(mask.tolist())
        rows["label"].append(i % 10)
    monkeypatch.setattr("hf_xent.data.load", lambda name, split: Dataset.from_dict(rows))
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_masks_from_a_few_images(tmp_path, digits, monkeypatch):
    import digit_backbone

    monkeypatch.setitem(digit_backbone.SIZES, "decoder_hidden_size", 16)
    options = {"train": 10, "epochs": 1, "episodes": 2}
    found, _ = ran("few_shot_masks", tmp_path / "out", **options)
    torch.manual_seed(1)
    (tmp_path / "out" / "results.json").unlink()
    monkeypatch.setattr(digit_backbone, "ClassTrainer", None)
    again, _ = ran("few_shot_masks", tmp_path / "out", **options)
    assert again == found, "the backbone is on disk, and episodes are the seed's"
    assert len({row["IoU, 5"] for row in found.values()}) > 1

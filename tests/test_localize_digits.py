"""The example of digits that are found from their labels, on stand-ins of its data."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Squares on noise, 64 x 64 pixels, of ten labels; the file's names."""
    draw, rows = np.random.default_rng(0), {"image": [], "mask": [], "label": []}
    for i in range(30):
        mask = np.zeros((64, 64), np.uint8)
        y, x = draw.integers(40, size=2)
        mask[y : y + 20, x : x + 20] = 1
        rows["image"].append((draw.integers(80, size=mask.shape) + 150 * mask).tolist())
        rows["mask"].append(mask.tolist())
        rows["label"].append(i % 10)
    monkeypatch.setattr("hf_xent.data.load", lambda name, split: Dataset.from_dict(rows))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    found = runpy.run_path(str(EXAMPLES / "localize_digits.py"))
    names = found["main"].__globals__
    names.update(HELD_OUT=10, SHOWN=2, BETAS=(0.5, 2.0))
    import localize_arms

    monkeypatch.setitem(localize_arms.SIZES, "hidden_sizes", [4, 6, 8])
    monkeypatch.setitem(localize_arms.SIZES, "embedding_size", 4)
    return names


def test_digits_are_localized(tmp_path, example, monkeypatch):
    found = example["main"](train=10, epochs=1, seeds=1, output=tmp_path)
    assert found.keys() == {*example["ARMS"], *example["CONTROLS"]}
    assert json.loads((tmp_path / "results.json").read_text())["results"].keys() == found.keys()
    for arm, rows in found.items():
        assert f"| {arm} |" in (tmp_path / "README.md").read_text()
        assert all(0 <= rows[0][name] <= 1 for name in example["METRICS"] if name in rows[0])
        assert rows[0]["IoU"] <= rows[0]["IoU, best threshold"]
        assert ("accuracy" in rows[0]) == (arm in example["ARMS"])
    assert found["whole image"][0]["IoU"] == pytest.approx(400 / 64**2)
    assert found["grey values"][0]["IoU"] == 1 and found["known mask in cells"][0]["average precision"] > 0.9
    assert found["CAM"][0]["beta"] == 0 and found["BAS"][0]["beta"] in (0.5, 2.0)
    assert (tmp_path / "masks.png").read_bytes()[1:4] == b"PNG"
    monkeypatch.setitem(example, "trained", None)
    assert example["main"](train=10, epochs=1, seeds=1, output=tmp_path) == found


def test_maps_are_measured_at_the_threshold_of_validation(example):
    truth = torch.tensor([[[1, 0], [0, 0]]])
    maps = [torch.tensor([[[0.9, 0.5], [0.1, 0.1]]]), torch.tensor([[[0.9, 0.7], [0.1, 0.1]]])]
    found = example["measured"](maps, [truth, truth])
    assert 0.5 <= found["threshold"] < 0.7
    assert found["IoU"] == 0.5 and found["IoU, best threshold"] == 1 and found["average precision"] == 1

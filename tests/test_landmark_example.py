"""The example of landmarks, on stand-ins of its data: every arm has results, which stay, and squares are erased."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from PIL import Image as images

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Discs with a hole for zeros, some bars for ones, and grey noise for photographs."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:28, :28]
    rows = {"image": [], "label": []}
    for i in range(20):
        far = np.hypot((x - 14) * draw.uniform(1, 1.6), y - 14)
        digit = (far < 10) & (far > 5) if i % 5 else x == 14
        rows["image"].append(images.fromarray((digit * 255).astype(np.uint8)))
        rows["label"].append(int(i % 5 == 0))
    table = Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")}))
    monkeypatch.setattr("hf_xent.data.load", lambda name, split: table)
    file = tmp_path / "noise.png"
    images.fromarray(draw.integers(0, 120, (80, 90)).astype(np.uint8)).save(file)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import landmark_digits

    monkeypatch.setattr(landmark_digits, "file_of", lambda *_: file)
    return landmark_digits


def test_rows_of_zeros(stand_ins):
    zeros, pictures = stand_ins.digits("train"), stand_ins.photographs()
    assert len(zeros) == 16 and zeros[0].shape == (48, 48)
    plain, hidden = (stand_ins.Zeros(zeros, pictures, "outlines", side > 0, (side, side), True) for side in (0, 20))
    masks = stand_ins.Zeros(zeros, pictures, "masks", fixed=True)
    for i in range(4):
        a, b, mask = plain[i], hidden[i], masks[i]["labels"].numpy()
        assert np.array_equal(a["labels"], b["labels"]) and np.array_equal(a["pixel_values"], plain[i]["pixel_values"])
        changed = (a["pixel_values"] != b["pixel_values"])[0].nonzero()
        assert (changed.max(0).values - changed.min(0).values < 20).all() and len(changed) > 100
        x, y = (a["labels"].numpy() * 64).mean(0)
        assert mask[int(y), int(x)] == 1, "the hole is within the outline"
    assert not np.array_equal(*(stand_ins.Zeros(zeros, pictures, "rings")[0]["pixel_values"] for _ in range(2)))


@pytest.mark.slow
def test_rings_against_masks(stand_ins, tmp_path):
    example = runpy.run_path(str(EXAMPLES / "landmarks.py"))
    main = example["main"]
    found = main(train=14, epochs=0.5, seeds=1, output=tmp_path / "out")
    controls = {"mean shape", "true ring", *(f"{arm}, repaired" for arm in example["ARMS"] if "U-Net" in arm)}
    assert found.keys() == {*example["ARMS"], *controls}
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["results"].keys() == found.keys()
    for arm, rows in found.items():
        assert set(example["METRICS"]) <= rows[0].keys() and len(rows[0]) == 16
        assert f"| {arm} |" in (tmp_path / "out" / "README.md").read_text()
    assert found["true ring"][0]["Dice, 0"] > 0.97 and found["true ring"][0]["one piece, 20"] == 1
    assert found["mean shape"][0]["Dice, 28"] == found["mean shape"][0]["Dice, 0"] > 0.4
    with images.open(tmp_path / "out" / "landmarks.png") as picture:
        assert min(picture.size) > 400
    assert np.load(tmp_path / "out" / "landmarks-0.npz")["20"].shape == (16, 40, 2)
    assert main(train=14, epochs=0.5, seeds=1, output=tmp_path / "out") == found

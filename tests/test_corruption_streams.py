"""The example of streams of corrupted digits: made-up digits, every arm, and a second call that runs nothing."""

import runpy
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def data(monkeypatch):
    """The example's digits: 24 for training, 8 for validation and as many for the test; two corruptions of them."""
    from PIL import Image

    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (28, 28), dtype=np.uint8)) for _ in range(32)]
    rows = datasets.Dataset.from_dict({"image": images, "label": [i % 10 for i in range(32)]})
    monkeypatch.setattr("hf_xent.data.load", lambda name, split: rows.select(range(8)) if split == "test" else rows)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import corrupted_digits

    for name, value in {
        "TRAIN": 24,
        "BATCH": 4,
        "EPOCHS": 1,
        "TEST": ("blur", "fog"),
        "VALIDATION": ("shift",),
    }.items():
        monkeypatch.setattr(corrupted_digits, name, value)
    return corrupted_digits


def test_streams_are_of_every_digit_under_every_corruption(data):
    rows = data.digits("test", 1)
    labels = [row["labels"] for row in rows]
    for gradual in (False, True):
        batches = [*data.batches(rows, data.TEST, gradual, 0)]
        assert [number for number, _, _ in batches] == [0, 0, 1, 1]
        assert torch.cat([y for _, _, y in batches]).tolist() == labels * 2
        assert all(x.shape == (4, 1, 28, 28) and x.min() >= -1 and x.max() <= 1 for _, x, _ in batches)
    train, held_out = ({tuple(row["pixel_values"].flatten().tolist()) for row in data.digits(s, 0)} for s in
                       ("train", "validation"))  # fmt: skip
    assert len(train) == 24 and len(held_out) == 8 and not train & held_out


def test_errors_are_counted_by_corruption(data):
    rows = data.digits("test", 0)
    right = torch.nn.functional.one_hot(torch.tensor([row["labels"] for row in rows]), 10)
    answers = iter([right[:4], right[4:], right[:4].roll(1, 1), right[4:]])  # half of the second corruption is wrong
    found = data.measured(lambda batch: next(answers), lambda **batch: None, data.batches(rows, data.TEST, False, 0), 2)
    assert found["errors"] == [0, 50] and found["mean"] == 25


@pytest.mark.slow
def test_corruption_streams_compares_all_arms(data, tmp_path, monkeypatch):
    example = runpy.run_path(str(EXAMPLES / "corruption_streams.py"))
    monkeypatch.setitem(example["main"].__globals__, "RATES", (1e-3, 1e-2))
    found = example["main"](seeds=1, output=tmp_path)
    assert set(example["ARMS"]) <= set(found) <= {*example["ARMS"], example["EQUAL"]}
    for row in (rows[0] for rows in found.values()):
        assert row["sudden"] == pytest.approx((row["blur"] + row["fog"]) / 2) and 0 <= row["gradual"] <= 100
    card = (tmp_path / "README.md").read_text()
    assert "less CE teacher" in card and all(f"| {arm} |" in card for arm in found)
    monkeypatch.setitem(example["main"].__globals__, "run", None)
    assert example["main"](seeds=1, output=tmp_path) == found, "nothing is run twice"

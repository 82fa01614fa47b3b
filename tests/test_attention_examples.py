"""The two examples of attention biases run on tiny models, end to end, and run nothing twice."""

import json
import sys
from pathlib import Path

import pytest

from support.models import tiny, tiny_tokenizer

WORDS = "the quick brown fox jumps over the lazy dog and naps "


@pytest.fixture
def examples(monkeypatch, tmp_path, without_progress_bars):
    """Where the scripts find one another, and a file of texts."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    for name in ("beyond_window", "block_attention"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": WORDS[i % 7 :] + WORDS * 12}) for i in range(20)))
    return texts


def test_beyond_window(examples, tmp_path, monkeypatch):
    import beyond_window as example

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    changes = {"BLOCK": 8, "ROWS": 2, "STEPS": 2, "SCORED": 4, "TEXTS": 3, "LENGTHS": (8, 24), "SIZE": size}
    for name, value in changes.items():
        monkeypatch.setattr(example, name, value)
    found = example.main(str(examples), seeds=1, output=tmp_path / "out")
    assert set(found) == set(example.ARMS)
    rows = {arm: found[arm][0] for arm in found}
    assert all(row.keys() == {"8", "24"} and all(0 < loss < 20 for loss in row.values()) for row in rows.values())
    alone, window, harmonic = (rows[f"{name} at test"] for name in ("rotary alone", "window of 128", "harmonic"))
    assert alone == pytest.approx(window, rel=1e-5), "no text here is longer than the window"
    assert harmonic["24"] != alone["24"] and rows["harmonic in training"] != harmonic
    monkeypatch.setattr(example, "trained", None)
    assert example.main(str(examples), seeds=1, output=tmp_path / "out") == found


def test_block_attention(examples, tmp_path, monkeypatch):
    import block_attention as example

    from hf_xent.attention import Probabilistic

    tiny().save_pretrained(tmp_path / "model")
    tiny_tokenizer(WORDS * 8).save_pretrained(tmp_path / "model")
    falls = {"1/d": Probabilistic(4, "inverse"), "all": Probabilistic(4, rate=1.0)}
    changes = {"LENGTH": 24, "SCORED": 8, "TEXTS": 2, "FIRST": 2, "FALLS": falls}
    for name, value in changes.items():
        monkeypatch.setattr(example, name, value)
    found = example.main(str(tmp_path / "model"), str(examples), seeds=1, output=tmp_path / "out")
    rows = {arm: found[arm][0] for arm in found}
    assert {"dense", "harmonic", "ALiBi", "1/d", "1/d, unbiased", "window, as 1/d", "first, as 1/d"} < set(rows)
    assert rows["all"]["nats"] == pytest.approx(rows["dense"]["nats"], rel=1e-5) and rows["all"]["share"] == 1
    assert abs(rows["window, as 1/d"]["share"] - rows["1/d"]["share"]) < 0.03
    gap = rows["1/d"]["nats"] - rows["first, as 1/d"]["nats"]
    assert rows["1/d"]["over the window with the first tokens"] == pytest.approx(gap)
    monkeypatch.setattr(example, "nats", None)
    again = example.main(str(tmp_path / "model"), str(examples), seeds=1, output=tmp_path / "out")
    assert again == found

"""The example of rationales, on a stand-in of the encyclopedia: all arms in one seed, and nothing is run twice."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import BertConfig, BertModel

from support.models import tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
WORDS = {
    "biology": "the cat eats a small mouse",
    "geography": "a river runs in the east",
    "arts": "she sings an old song",
    "mathematics": "a set has some sum of parts",
    "other": "it was the year of a king",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny encoder; articles of two sentences, six of each topic and half."""
    draw, rows = np.random.default_rng(0), {"text": [], "topic": []}
    names = {"biology": "Biology and health sciences", "geography": "Geography", "arts": "Arts"}
    for i in range(60):
        topic = [*WORDS][i % 5]
        parts = [" ".join(draw.permutation(WORDS[topic].split())) + " again." for _ in range(2)]
        rows["text"].append(" ".join(parts))
        rows["topic"].append(names.get(topic, "Mathematics" if topic == "mathematics" else "History"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
    tokenizer = tiny_tokenizer(" ".join(WORDS.values()) + " again.")
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    monkeypatch.setattr("hf_xent.data.load", lambda name, split: Dataset.from_dict(rows))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import planted_topics

    for kept in (planted_topics.planted, planted_topics.articles):
        kept.cache_clear()  # of another test's articles
    return tmp_path


def test_rationales_of_planted_sentences(folder):
    example, out = runpy.run_path(str(EXAMPLES / "rationales.py")), folder / "out"
    options = {"texts": 16, "test": 8, "steps": 1, "mask_steps": 1, "seeds": 1, "output": out}
    found = example["main"](str(folder / "encoder"), **options)
    assert found.keys() == {*example["arms"].MASKS, *example["arms"].OTHERS}
    assert json.loads((out / "results.json").read_text())["results"].keys() == found.keys()
    assert all(f"| {arm} |" in (out / "README.md").read_text() for arm in found)
    assert all(0 < rows[0][metric] <= 1 for rows in found.values() for metric in ("AP", "IoU"))
    assert len({row[0]["AP"] for row in found.values()}) > 3, "arms differ"
    assert len({row[0]["accuracy"] for row in found.values()}) == 1, "the classifier is the same"
    assert {arm for arm, rows in found.items() if "area" in rows[0]} == {*example["arms"].MASKS}
    assert len([*out.glob("*.html")]) == 3 and "<mark" in (out / "mask-by-BAS-0.html").read_text()
    assert example["main"](str(folder / "encoder"), **options) == found


def test_planted_texts(folder):
    import planted_topics

    rows, other = planted_topics.planted(1, 24), planted_topics.planted(1, 24, held=True)
    evidence = [row["text"][row["start"] : row["end"]] for row in rows]
    for row, part in zip(rows, evidence, strict=True):
        topic = ("biology", "geography", "mathematics", "arts")[row["labels"]]
        assert sorted(part.split()) == sorted((WORDS[topic] + " again.").split())
        assert row["text"].count("again.") == 3 and "king" in row["text"]
    assert {row["start"] == 0 for row in rows} == {True, False}
    assert sorted(rows["labels"][:]) == sorted(other["labels"][:]) and rows["text"][:] != other["text"][:]

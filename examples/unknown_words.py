"""Words that no topic is about, and definitions as texts for names: what a search in WordNet gives for some topics.

    words = Words(encoder, "wordnet:FOLDER", seed=0)              FOLDER: usr/share/wordnet of Debian's wordnet-base
    negatives, random = words.mined(names, folder), words.drawn(names, folder)
    texts, labels = words.definitions(names, negatives, folder)

A seed draws the candidates, of which a fifth become negative labels. Rows for tuning come from the names alone, as
LAPT's images are retrieved by label: for each topic the definitions of the candidates nearest to its name, and for
negative labels, as many of them drawn at random, their own definitions.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModel, AutoTokenizer

from hf_xent import data
from hf_xent.adapt import NegativeLabels, class_texts
from hf_xent.adapt.negatives import closeness

CANDIDATES, COUNT, ROWS = 5000, 1000, 16
CONTEXT = "a text about"
TEMPLATES = dict.fromkeys(("noun", "adjective"), (f"{CONTEXT} {{}}.",))


class Words:
    """The words of a seed, and the encoder that reads them."""

    def __init__(self, encoder: str, source: str, seed: int):
        self.model, self.tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
        self.source, self.seed = source, seed

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The nouns and adjectives of WordNet."""
        return data.load(self.source, split="train").to_list()

    def search(self, names: list[str], count: int, folder: Path) -> Any:
        """The `count` least close candidates; their features are kept."""
        found = NegativeLabels(self.rows, count=count, limit=CANDIDATES, templates=TEMPLATES, seed=self.seed)
        return found.mine(self.model, self.tokenizer, names, folder=folder)

    def mined(self, names: list[str], folder: Path) -> Any:
        """The negative labels of the topics."""
        return self.search(names, COUNT, folder)

    def drawn(self, names: list[str], folder: Path) -> Any:
        """The features of as many candidates, drawn at random: the control of the search."""
        every = self.search(names, CANDIDATES, folder)
        return every.features[np.random.default_rng(self.seed).choice(len(every), COUNT, replace=False)]

    def definitions(self, names: list[str], negatives: Any, folder: Path) -> tuple[list[str], list[int]]:
        """Texts for the names and for some negatives, and their labels; negatives follow the names."""
        texts = {}
        for row in self.rows:
            texts.setdefault(row["word"], f"{row['word']}: {row['text']}")
        every, labeled = self.search(names, CANDIDATES, folder), []
        cosines = (every.features @ class_texts(self.model, self.tokenizer, names, TEMPLATES["noun"]).T).numpy()
        for topic in range(len(names)):
            own = [i for i in np.argsort(-cosines[:, topic]) if cosines[i].argmax() == topic][:ROWS]
            labeled += [(texts[every.names[i]], topic) for i in own]
        some = np.random.default_rng(self.seed).choice(len(negatives), len(labeled), replace=False)
        labeled += [(texts[negatives.names[i]], len(names) + int(i)) for i in some]
        return [text for text, _ in labeled], [label for _, label in labeled]

    def rank(self, held: list[str], names: list[str], folder: Path) -> float:
        """The mean share of candidates that are less close to the topics than the names that were held out."""
        topics, out = (class_texts(self.model, self.tokenizer, some, TEMPLATES["noun"]) for some in (names, held))
        every = self.search(names, CANDIDATES, folder)
        return float((every.closeness[None] < closeness(out, topics)[:, None]).float().mean())

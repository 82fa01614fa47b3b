"""'preferences': pairs of continuations of CPython's language reference, with labels of known reliability.

A prompt is the start of a paragraph. One continuation is the paragraph's own, the other that of another paragraph; both
have the same number of words. `preference_prob` is 0.6, 0.8 or 1, and with this probability `chosen` is the paragraph's
own, as a soft label says. What is drawn is drawn under seed 0.

Source: CPython's `pydoc_data.topics`, as for 'pydoc'; Python Software Foundation license.
Columns: topic, prompt, chosen, rejected, preference_prob, own (1 if `chosen` is the paragraph's own continuation).
"""

from __future__ import annotations

import random
from typing import Any

from .corpus import InstalledCorpus, checked_text

WORDS, PROMPT, RELIABLE = range(24, 96), 10, (0.6, 0.8, 1.0)
"""Words of the paragraphs that are used, words of a prompt, and the probabilities of right labels."""


def make() -> Any:
    """One row for each paragraph of prose, in the order of topics."""
    from pydoc_data.topics import topics

    from datasets import Dataset  # lazy: half a second

    found = [(name, words) for name in sorted(topics) for words in _paragraphs(topics[name])]
    found = list({tuple(words): (name, words) for name, words in found}.values())  # some topics share paragraphs
    rng, rows = random.Random(0), []
    for name, words in found:
        other = rng.choice(found)[1]
        while other is words:
            other = rng.choice(found)[1]
        end = min(len(words), len(other))  # so that length tells nothing
        own, strange = words[PROMPT:end], other[PROMPT:end]
        probability = rng.choice(RELIABLE)
        is_own = rng.random() < probability
        chosen, rejected = (own, strange) if is_own else (strange, own)
        row = {"topic": name, "prompt": " ".join(words[:PROMPT]), "chosen": f" {' '.join(chosen)}"}
        rows.append({**row, "rejected": f" {' '.join(rejected)}", "preference_prob": probability, "own": int(is_own)})
    return Dataset.from_list(rows)


def _paragraphs(text: str) -> list[list[str]]:
    """The words of the paragraphs that are prose: not indented, and of a length that fits."""
    parts = (part for part in text.split("\n\n") if part[:1].isalpha() and "\n " not in part)
    return [words for part in parts if len(words := part.split()) in WORDS]


def _row(row: dict[str, Any]) -> dict[str, Any]:
    texts = {name: checked_text(row[name]) for name in ("topic", "prompt", "chosen", "rejected")}
    return {**texts, "preference_prob": float(row["preference_prob"]), "own": int(row["own"])}


class Preferences(InstalledCorpus):
    """The pairs, whose probabilities are numbers with a fraction."""

    def features(self) -> Any:
        """As of any installed data set, but for the probabilities."""
        from datasets import Features, Value

        return Features({**super().features(), "preference_prob": Value("float64")})


CORPUS = Preferences(
    title="preferences",
    family="text",
    license="other",
    caveat="Under the license of the Python Software Foundation; pairs and their labels are made by a program.",
    source="the module pydoc_data.topics of CPython",
    row=_row,
    columns=("topic", "prompt", "chosen", "rejected", "preference_prob", "own"),
    splits={"train": None},
    tasks=("text-generation",),
    make=make,
    numbers=("own",),
)

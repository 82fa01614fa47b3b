"""Questions for the definitions of words, and how much of an answer's words a text has; for noisy_instructions.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from datasets import Dataset

from hf_xent import data

WORDS, ROWS = range(5, 13), 512  # words of an answer, and rows that are used


def questions(source: str) -> Dataset:
    """Questions and answers of a few words, as many as are used."""
    rows = data.load_text(source, column="text" if source.startswith("wordnet") else "question").shuffle(seed=0)
    if "word" in rows.column_names:
        rows = rows.map(lambda x: {"question": f"What is meant by '{x['word']}'?", "answer": x["text"].split(";")[0]})
    rows = rows.select_columns(["question", "answer"]).filter(lambda row: len(row["answer"].split()) in WORDS)
    return rows.select(range(min(ROWS, len(rows))))


def f1(found: Sequence[Hashable], expected: Sequence[Hashable]) -> float:
    """The harmonic mean of precision and recall."""
    counts = Counter(found), Counter(expected)
    return 2 * (counts[0] & counts[1]).total() / max(1, counts[0].total() + counts[1].total())

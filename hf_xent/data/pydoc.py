"""'pydoc': the language reference that every CPython carries, about 0.5 MB of English prose and code in 79 topics.

Text for smoke runs, examples and benchmarks: always there, no download. Its wording changes with the Python version.

Source: CPython's `pydoc_data.topics`, the pages behind `help('topics')`; Python Software Foundation license.
Columns: topic, text.
"""

from __future__ import annotations

from typing import Any

from .corpus import Corpus, Source, checked_text


class Pydoc(Corpus):
    """One row a topic, sorted by name; 'train' is all there is."""

    def open(self, source: Source, split: str | None) -> Any:
        """The topics of this Python, or of a copy."""
        if source.path is not None:
            return super().open(source, split)
        from pydoc_data.topics import topics

        from datasets import Dataset, DatasetDict, ReadInstruction  # lazy: half a second

        names = sorted(topics)
        whole = Dataset.from_dict({"topic": names, "text": [topics[name] for name in names]})
        if split is not None:
            [part] = ReadInstruction.from_spec(split).to_absolute({"train": len(whole)})
            whole = whole.select(range(part.from_ or 0, len(whole) if part.to is None else part.to))
        whole = whole.to_iterable_dataset() if source.streaming else whole
        return DatasetDict(train=whole) if split is None else whole

    def _complaint(self, source: Source, error: Exception) -> str:
        return "split: 'pydoc' has 'train' alone, or a slice of it such as 'train[:90%]'"


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {"topic": row["topic"], "text": checked_text(row["text"])}


CORPUS = Pydoc(
    title="pydoc",
    family="text",
    license="other",
    caveat="Under the license of the Python Software Foundation; the wording is that of one Python version.",
    source="the module pydoc_data.topics of CPython",
    row=_row,
    columns=("topic", "text"),
    splits={"train": None},
    tasks=("text-generation",),
)

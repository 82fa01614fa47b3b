"""'pydoc': the language reference that comes with every CPython, about 0.5 MB of English prose and code in 79 topics.

Text for smoke tests, examples and benchmarks, without a download. Its wording changes with the Python version.

Source: CPython's `pydoc_data.topics`, the pages behind `help('topics')`; Python Software Foundation license.
Columns: topic, text.
"""

from __future__ import annotations

from typing import Any

from .corpus import InstalledCorpus, checked_text


def make() -> Any:
    """The topics of the running Python, sorted by name."""
    from pydoc_data.topics import topics

    from datasets import Dataset  # lazy: half a second

    names = sorted(topics)
    return Dataset.from_dict({"topic": names, "text": [topics[name] for name in names]})


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {"topic": row["topic"], "text": checked_text(row["text"])}


CORPUS = InstalledCorpus(
    title="pydoc",
    family="text",
    license="other",
    caveat="Under the license of the Python Software Foundation; the wording is that of one Python version.",
    source="the module pydoc_data.topics of CPython",
    row=_row,
    columns=("topic", "text"),
    splits={"train": None},
    tasks=("text-generation",),
    make=make,
)

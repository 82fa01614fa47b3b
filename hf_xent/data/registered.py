"""The registered datasets: each is a file with a `CORPUS` and a line here; `wikimia.py` is an example for a new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..registry import Registry
from .corpus import Corpus, Source
from .files import expanded_path

DATASETS: Registry[Corpus] = Registry(
    "dataset",
    {
        "asterisk": "asterisk:CORPUS",
        "bfi": "bfi:CORPUS",
        "bookmia": "bookmia:CORPUS",
        "breast_cancer": "breast_cancer:CORPUS",
        "brown": "brown:CORPUS",
        "cities": "cities:CORPUS",
        "composites": "composites:CORPUS",
        "dactyl": "dactyl:CORPUS",
        "diabetes": "diabetes:CORPUS",
        "faces": "faces:CORPUS",
        "hate": "hate:CORPUS",
        "mimir": "mimir:CORPUS",
        "mnist": "mnist:CORPUS",
        "patentmia": "patentmia:CORPUS",
        "phishing": "phishing:CORPUS",
        "preferences": "preferences:CORPUS",
        "pydoc": "pydoc:CORPUS",
        "wiki": "wiki:CORPUS",
        "wikimia": "wikimia:CORPUS",
        "wordnet": "wordnet:CORPUS",
    },
    package=__package__,
)
"""Name -> dataset; some have configurations, 'name:configuration', such as 'brown:FOLDER'."""


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
        path: A local copy that is read instead of the published one: a folder, zip, JSONL or Parquet file with rows as
            published.
        split: One split, or, unless it is streamed, a slice of one such as 'train[:1%]'; None for all splits by name.
        streaming: Whether rows are read during iteration.
        revision: A branch, tag or commit of the Hub.

    Returns:
        A dataset or a dictionary of datasets by split, as `datasets.load_dataset` returns for these options.

    Raises:
        ValueError: For an unknown name, a copy that cannot be downloaded or read, or a row that is not as published.
    """
    key, _, config = name.partition(":")
    copy = None if path is None else expanded_path(path)
    return DATASETS.find(key).load(Source(copy, config, streaming, revision), split)


def usages() -> str:
    """How to name each dataset, in one line: 'bookmia, brown:FOLDER, ...', from the first lines of their files."""
    return ", ".join(row["summary"].partition("': ")[0].removeprefix("'") for row in DATASETS.table())

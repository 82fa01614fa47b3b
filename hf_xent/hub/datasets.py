"""A registered dataset as a folder of Parquet files with a card, and that folder on the Hub.

FOLDER/data/{split}-{i}-of-{n}.parquet      rows of the family's schema
FOLDER/README.md                            written last: a folder that has it is complete
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.utils import validate_repo_id

from .. import hub
from ..data import DATASETS, Corpus, load

SHARD = 500 * 2**20
"""The approximate number of bytes of rows in a file."""
BATCH = 10_000
"""Rows whose bytes are counted at a time."""


def export(name: str, folder: str | Path, path: str | Path | None = None, **options: Any) -> Path:
    """Writes a registered dataset and its card into a folder.

    Args:
        name: A name in `hf_xent.data.DATASETS`, with a configuration if it has any.
        folder: A new or empty folder.
        path: A local copy of the dataset, as for `hf_xent.data.load`.
        **options: The other options of `load`.

    Returns:
        The folder.

    Raises:
        ValueError: As `load` does, and for a folder that is not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder is {str(folder)!r}, which is not empty: choose another")
    parts = load(name, path, **options)
    split = options.get("split")
    parts = {split.partition("[")[0]: parts} if split else parts
    key, _, config = name.partition(":")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        _write(rows, folder / "data", part)
    (folder / "README.md").write_text(_card(DATASETS[key], config, parts), encoding="utf-8")
    return folder


def to_hub(
    name: str,
    repo_id: str,
    path: str | Path | None = None,
    *,
    private: bool = True,
    create_pr: bool = False,
    **options: Any,
) -> str:
    """Exports a registered dataset, and pushes it to the Hub.

    Args:
        name: A name in `hf_xent.data.DATASETS`, with a configuration if it has any.
        repo_id: The repository, 'user/name'.
        path: A local copy of the dataset, as for `hf_xent.data.load`.
        private: Whether a new repository is private, as a copy of other people's texts should be: read the caveat on
            its card before you make it public.
        create_pr: Whether the change is proposed as a pull request instead of committed.
        **options: The other options of `load`.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: As `load` does, and for a `repo_id` that is not a name of a repository.
        RuntimeError: As `hf_xent.hub.push` does.
    """
    validate_repo_id(repo_id)  # before the rows are written
    with tempfile.TemporaryDirectory() as folder:
        export(name, folder, path, **options)
        return hub.push(folder, repo_id, repo_type="dataset", private=private, create_pr=create_pr)


def describe(head: Any, parts: Mapping[str, Any]) -> None:
    """Writes what the Hub's viewer and `load_dataset` read of a configuration: columns, splits and their sizes.

    Args:
        head: A `DatasetCardData`, which gets the field `dataset_info`.
        parts: Split -> a `datasets.Dataset`; all have the same columns.
    """
    from datasets import DatasetInfo, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict

    sizes = {split: sum(t.nbytes for t in rows.with_format("arrow").iter(BATCH)) for split, rows in parts.items()}
    splits = SplitDict()
    for split, rows in parts.items():
        splits.add(SplitInfo(split, num_bytes=sizes[split], num_examples=len(rows)))
    features = next(iter(parts.values())).features
    info = DatasetInfo(features=features, splits=splits, dataset_size=sum(sizes.values()))
    DatasetInfosDict({"default": info}).to_dataset_card_data(head)


def _write(rows: Any, folder: Path, split: str) -> None:
    count = max(1, -(-rows.data.nbytes // SHARD))
    for i in range(count):
        rows.shard(count, i, contiguous=True).to_parquet(folder / f"{split}-{i:05}-of-{count:05}.parquet")


def _card(corpus: Corpus, config: str, parts: dict[str, Any]) -> str:
    from huggingface_hub import DatasetCardData

    total = sum(len(rows) for rows in parts.values())
    head = DatasetCardData(
        license=corpus.license,
        language=corpus.language,
        pretty_name=" ".join(filter(None, [corpus.title, Path(config).name])),
        task_categories=list(corpus.tasks),
        size_categories=size_of(total),
        tags=["hf_xent", corpus.family],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*"} for split in parts],
            }
        ],
    )
    describe(head, parts)
    rows = [{"split": split, "rows": len(part), "labels": _labels(corpus, part)} for split, part in parts.items()]
    return hub.render("dataset", head, corpus=corpus, features=corpus.features(), splits=rows)


def _labels(corpus: Corpus, rows: Any) -> str:
    """The number of rows with each label, as text."""
    names = getattr(corpus.features().get("label"), "names", ())
    labels = rows["label"][:] if names else []
    return ", ".join(f"{labels.count(i)} {name}" for i, name in enumerate(names))


def size_of(rows: int) -> str:
    """The Hub's name for a number of rows."""
    steps = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    return next((name for limit, name in steps if rows < limit), "1M<n<10M")

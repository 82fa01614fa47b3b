"""A registered dataset: where it was published, the schema of its rows, and the caveat for the card of a copy.

    Hub repository | local folder, zip, JSONL, Parquet  ->  rows as published  ->  rows of the family's schema

    membership   text, label (non-member, member), source, length        length in characters
    generated    text, label (human, ai), model, domain, category        the last two may be null
    ratings      text, unit, rater, the items, score (the published measure)
    text         as in the docstring of the dataset's file
    images       as in the docstring of the dataset's file
    labeled      values (numbers) or image, label: see `labeled.py`

Every row is checked as it is read, streaming or not: the published columns exist, text is not empty, a label is 0 or 1.
Rows are neither dropped nor reordered.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..system.access import refusal
from .files import expanded_path, files_by_split, first_line, table

LABELS = {"membership": ("non-member", "member"), "generated": ("human", "ai")}
"""Family -> the names of labels 0 and 1; label 1 is the positive class of scores."""


class Source(NamedTuple):
    """Which copy of a dataset to read: a local `path`, or the published one at `revision`."""

    path: Path | None = None
    config: str = ""
    streaming: bool = False
    revision: str | None = None


@dataclass(frozen=True)
class Corpus:
    """One published dataset, described by a file of `hf_xent.data`."""

    title: str
    family: str
    """'membership', 'generated', 'ratings', 'text', 'images' or 'labeled'."""
    license: str
    """The Hub's name for it."""
    caveat: str
    """A warning for the card of any copy."""
    source: str
    """Who published it, and where."""
    row: Callable[[dict[str, Any]], dict[str, Any]]
    """A row as published -> a row in the schema of the family."""
    columns: tuple[str, ...]
    """The published columns that `row` reads."""
    splits: dict[str, int | None]
    """Split -> the published number of rows, None where that is not known."""
    repo: str | None = None
    """Hub id, where there is one."""
    language: str = "en"
    tasks: tuple[str, ...] = field(default=("text-classification",))
    configured: bool = False
    """Whether a configuration follows the name: 'mimir:arxiv'."""

    def load(self, source: Source, split: str | None) -> Any:
        """The rows of a split, or all splits by name; see `hf_xent.data.load`."""
        return self.unify(self.read(source, split), source, split)

    def read(self, source: Source, split: str | None) -> Any:
        """The rows as published, not yet checked."""
        self._check(source)
        source = self.placed(source)
        try:
            return self.open(source, split)
        except Exception as error:  # `datasets` and the Hub raise many types of them
            raise ValueError(self._complaint(source, error)) from error

    def unify(self, rows: Any, source: Source, split: str | None) -> Any:
        """The rows of `read`, checked and in the schema of the family."""
        source = self.placed(source)
        if isinstance(rows, dict):
            return type(rows)({name: self._unify(part, source, name) for name, part in rows.items()})
        return self._unify(rows, source, split)

    def open(self, source: Source, split: str | None) -> Any:
        """The rows as published."""
        from datasets import load_dataset

        if source.path is not None:
            parts = files_by_split(source.path, self.splits)
            return select_split({name: table(*part, streaming=source.streaming) for name, part in parts.items()}, split)
        if self.repo is None:
            raise ValueError("not on the Hub")
        return load_dataset(self.repo, revision=source.revision, split=split, streaming=source.streaming)

    def placed(self, source: Source) -> Source:
        """The source with its path, for datasets whose configuration is one."""
        return source

    def _check(self, source: Source) -> None:
        """Raises: ValueError for options that have no meaning for this dataset."""
        if source.config and not self.configured:
            raise ValueError(
                f"{self.title} has no configurations, but the source names {source.config!r}: leave it out"
            )
        if source.revision is not None and (source.path is not None or self.repo is None):
            raise ValueError(
                f"revision is {source.revision!r}, but {self.title} is not read from the Hub: leave it out"
            )

    def features(self) -> Any:
        """The schema of the family."""
        from datasets import ClassLabel, Features, Value

        text = Value("string")
        label = ClassLabel(names=list(LABELS[self.family]))
        more = {
            "membership": {"source": text, "length": Value("int32")},
            "generated": {"model": text, "domain": text, "category": text},
        }
        return Features({"text": text, "label": label, **more[self.family]})

    def _unify(self, rows: Any, source: Source, split: str | None) -> Any:
        columns = rows.column_names or list(next(iter(rows), {}))  # some streams know their columns only by their rows
        if missing := [name for name in self.columns if name not in columns]:
            raise ValueError(
                f"{self.title}: no column {', '.join(missing)} among {', '.join(columns) or 'none'}; pass a copy as it"
                f" was published ({self.source})"
            )
        if not source.streaming:
            self._count(rows, source, split)
        return self._in_schema(rows, columns, {} if source.streaming else {"desc": self.title})

    def _in_schema(self, rows: Any, columns: list[str], progress: dict[str, str]) -> Any:
        return rows.map(self.row, remove_columns=columns, features=self.features(), **progress)

    def _count(self, rows: Any, source: Source, split: str | None) -> None:
        expected = self.splits.get(split or "")
        if not len(rows):
            raise ValueError(f"{self.title} (split {split}) has no rows: choose another split or copy")
        if source.path is None and expected not in (None, len(rows)):
            warnings.warn(
                f"{self.title} {split} has {len(rows)} rows, but {expected} were published: it changed, pin a revision",
                stacklevel=5,
            )

    def _complaint(self, source: Source, error: Exception) -> str:
        if source.path is not None:
            return f"{self.title}: cannot read {source.path}: {first_line(error)}"
        if self.repo is None:
            return f"{self.title} is not on the Hub: get it from {self.source}, then pass its location as path"
        hint = "" if refusal(error) else ", for a gated dataset log in with `hf auth login`"
        return (
            f"{self.title}: {self.repo} on the Hub does not load: {first_line(error)}; without a connection pass a"
            f" local copy as path, for a mirror set HF_ENDPOINT{hint}"
        )


class FolderCorpus(Corpus):
    """A dataset whose configuration is the folder of its files, 'brown:FOLDER', as `path` is."""

    def placed(self, source: Source) -> Source:
        """The source with the configuration as its path."""
        if source.path is None and source.config:
            return source._replace(path=expanded_path(source.config))
        return source


@dataclass(frozen=True)
class InstalledCorpus(Corpus):
    """A dataset made from an installed package; its only split is 'train', unless it says otherwise."""

    make: Callable[[], Any] = field(kw_only=True)
    numbers: tuple[str, ...] = ()
    """Columns of whole numbers; those that are neither these nor images are text."""
    images: tuple[str, ...] = ()
    """Columns of images."""
    later: tuple[str, ...] = ()
    """Columns of text that copies from before they were added lack; `row` makes them null there."""

    def open(self, source: Source, split: str | None) -> Any:
        """The rows of `make`, or those of a copy."""
        if source.path is not None:
            return super().open(source, split)
        return split_of_train(self.make(), split, source.streaming)

    def features(self) -> Any:
        """Columns of text, of whole numbers and of images."""
        from datasets import Features, Image, Value

        names = (*self.columns, *self.later)
        kinds = {name: Value("int64" if name in self.numbers else "string") for name in names}
        return Features({**kinds, **{name: Image() for name in self.images}})

    def _complaint(self, source: Source, error: Exception) -> str:
        if source.path is not None:
            return super()._complaint(source, error)
        if isinstance(error, ImportError):
            return first_line(error)
        names, first = " and ".join(map(repr, self.splits)), next(iter(self.splits))
        return f"split: {self.title!r} has only {names}; choose one, or a slice such as '{first}[:90%]'"


def select_split(parts: dict[str, Any], split: str | None) -> Any:
    """Selects a split, slices of splits, or all (None) from splits by name, as `datasets.load_dataset` does."""
    from datasets import DatasetDict, IterableDataset, IterableDatasetDict, ReadInstruction, concatenate_datasets

    streaming = any(isinstance(rows, IterableDataset) for rows in parts.values())
    if split is None:
        return (IterableDatasetDict if streaming else DatasetDict)(parts)
    if streaming:
        if split not in parts:
            raise ValueError(f"split is {split!r}, but a stream has no slices: choose one of {', '.join(parts)}")
        return parts[split]
    sizes = {name: len(rows) for name, rows in parts.items()}
    slices = ReadInstruction.from_spec(split).to_absolute(sizes)
    selected = []
    for part in slices:
        rows = range(part.from_ or 0, sizes[part.splitname] if part.to is None else part.to)
        selected.append(parts[part.splitname].select(rows or []))  # an empty range would be refused as out of range
    return selected[0] if len(selected) == 1 else concatenate_datasets(selected)


def split_of_train(whole: Any, split: str | None, streaming: bool) -> Any:
    """Rows that are all of the split 'train', in the form that `datasets.load_dataset` returns for a split."""
    part = whole if split is None else select_split({"train": whole}, split)
    part = part.to_iterable_dataset() if streaming else part
    return select_split({"train": part}, None) if split is None else part


def member(text: Any, label: Any, source: str) -> dict[str, Any]:
    """A checked row of the membership family."""
    return {"text": checked_text(text), "label": checked_label(label), "source": source, "length": len(text)}


def checked_text(text: Any) -> str:
    """The text. Raises: ValueError if it is empty or not a string."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"a row has the text {text!r}: every row needs some; the copy is broken")
    return text


def checked_label(label: Any) -> int:
    """The label as a number; a table without types has it as a word. Raises: ValueError unless it is 0 or 1."""
    if label not in (0, 1, "0", "1"):
        raise ValueError(f"a row has the label {label!r}: labels are 0 and 1; the copy is broken")
    return int(label)

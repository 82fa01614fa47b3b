"""The rows of a classifier's run: labels as ids or numbers, a held-out part, and what the model reads of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.rows import Columns, Labeled
from ..models.classifiers import Classifier

LENGTH = 256
"""The default of max_length, tokens."""


@dataclass(frozen=True)
class Part:
    """Rows that a trainer reads."""

    rows: Any
    """The inputs of the model, 'labels' if they are known, and the columns of the loss."""
    indices: np.ndarray
    """The index of each row in the data it is from, [N]."""


def class_names(data: Labeled, source: str, loss: str) -> list[str]:
    """The classes of the labels in their order: that of the data set, of numbers, or of the alphabet.

    Raises:
        ValueError: Labels are fractions, or there are not two classes.
    """
    found = {label for label in _flat(data) if label is not None}
    where = f"{source} has in its column {data.columns.label!r}"
    if fractions := [label for label in found if isinstance(label, float) and not label.is_integer()]:
        raise ValueError(
            f"{where} numbers such as {fractions[0]}, but {loss} is a loss of classes: choose one of values"
        )
    if len(found) < 2:
        only = f"the one class {name_of(next(iter(found)))!r}" if found else "no labels"
        raise ValueError(f"{where} {only}: two classes or more are needed")
    if data.names:
        return data.names
    if all(isinstance(label, int | float) for label in found):
        return [name_of(label) for label in sorted(found)]
    if len(found) > 100 and len(found) > len(data.rows) / 2:
        raise ValueError(f"{where} {len(found)} labels for {len(data.rows)} rows: choose a column of classes")
    return sorted({name_of(label) for label in found})


def name_of(label: Any) -> str:
    """The name of a class: 1.0 is '1'."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def check_names(data: Labeled, names: Sequence[str], source: str) -> None:
    """Raises: ValueError for labels that are not among the classes of a model."""
    if others := sorted({name_of(x) for x in _flat(data) if x is not None} - set(names)):
        raise ValueError(
            f"{source} has in its column {data.columns.label!r} the label {others[0]!r}, but the model knows"
            f" {', '.join(names)}: correct or remove it"
        )


def as_ids(data: Labeled, names: Sequence[str]) -> list[Any]:
    """Labels as ids, and as -100 where there are none."""
    ids = {name: i for i, name in enumerate(names)}
    one = lambda label: -100 if label is None else ids[name_of(label)]  # noqa: E731  used in the next line
    labels = data.labels or []
    return [[one(x) for x in label] if isinstance(label, list) else one(label) for label in labels]


def as_numbers(data: Labeled, source: str, loss: str) -> list[float]:
    """Labels as numbers, and as nan where there are none. Raises: ValueError for what is no number."""
    numbers = []
    for label in data.labels or []:
        try:
            numbers.append(float("nan") if label is None else float(label))
        except (ValueError, TypeError):
            raise ValueError(
                f"{source} has in its column {data.columns.label!r} the label {label!r}, but {loss} is a loss of"
                " values: choose a column of numbers, or a loss of classes"
            ) from None
    return numbers


def known(labels: Sequence[Any]) -> np.ndarray:
    """The indices of rows with a label; of tokens, with one at least."""
    there = [any(x != -100 for x in y) if isinstance(y, list) else y == y and y != -100 for y in labels]
    return np.flatnonzero(there)


def divided(indices: np.ndarray, share: float, seed: int, groups: Sequence[Any] | None) -> tuple[Any, Any]:
    """Rows to train on and held-out rows, drawn at random; rows of one group stay together.

    Raises:
        ValueError: One of the two parts would be empty.
    """
    keys = np.arange(len(indices)) if groups is None else np.unique(np.asarray(groups)[indices], return_inverse=True)[1]
    drawn = np.random.default_rng(seed).permutation(keys.max() + 1 if len(keys) else 0)
    count = max(1, round(share * len(drawn)))
    if len(drawn) < 2 or count >= len(drawn):
        what = "rows with a label" if groups is None else "groups of rows"
        raise ValueError(f"eval_share is {share:g} of {len(drawn)} {what}: one has to be held out, and one to train on")
    held = np.isin(keys, drawn[:count])
    return indices[~held], indices[held]


def part(data: Labeled, labels: list[Any] | None, indices: np.ndarray, encode: Callable[[Any], Any]) -> Part:
    """Some rows, as the model reads them."""
    rows = data.rows.select(indices)
    if labels is not None:
        rows = rows.add_column("labels", [labels[i] for i in indices])
    return Part(encode(rows), indices)


def encoder(classifier: Classifier, columns: Columns, max_length: int | None) -> Callable[[Any], Any]:
    """A function from rows to rows that `Collator` takes: texts are tokenized, images and numbers stay as they are.

    Raises:
        ValueError: The model has not so many positions.
    """
    task, processor = columns.task, classifier.processor
    if task in ("image", "table"):
        return lambda rows: rows
    from ..models.anatomy import check_room, positions

    if max_length is None:
        max_length = min(LENGTH, processor.model_max_length, positions(classifier.model) or LENGTH)
    check_room(classifier.model, max_length, "max_length")

    def texts(batch: dict[str, list[Any]]) -> Any:
        pairs = [batch["text_pair"]] if "text_pair" in batch else []
        return processor(batch["text"], *pairs, truncation=True, max_length=max_length)

    def tokens(batch: dict[str, list[Any]]) -> Any:
        encoded = processor(batch["tokens"], is_split_into_words=True, truncation=True, max_length=max_length)
        words = [encoded.word_ids(i) for i in range(len(batch["tokens"]))]
        firsts = [[w if w is not None and w not in ids[:i] else -1 for i, w in enumerate(ids)] for ids in words]
        if "labels" in batch:
            pairs = zip(firsts, batch["labels"], strict=True)
            encoded["labels"] = [[-100 if w < 0 else labels[w] for w in ids] for ids, labels in pairs]
        return {**encoded, "words": firsts}

    apply = tokens if task == "tokens" else texts
    return lambda rows: rows.map(apply, batched=True, remove_columns=[task if task == "tokens" else "text"])


def standardize(model: Any, data: Labeled, indices: np.ndarray) -> None:
    """Makes a model of tables standardize values by their means and deviations over some rows, and know the columns."""
    import torch

    values = np.asarray(data.rows.select(indices)["values"], np.float64)
    deviations = values.std(0)
    config = model.config
    config.mean, config.std = values.mean(0).tolist(), np.where(deviations > 0, deviations, 1.0).tolist()
    model.mean, model.std = torch.tensor(config.mean), torch.tensor(config.std)
    config.hf_xent_columns = list(data.columns.inputs)


def check_table(config: Any, data: Labeled, source: str) -> None:
    """Raises: ValueError if a model was trained on other columns."""
    wanted, found = getattr(config, "hf_xent_columns", None), list(data.columns.inputs)
    count = len(data.rows[0]["values"])
    if count != config.features or (wanted is not None and len(found) > 1 and found != wanted):
        raise ValueError(
            f"{source} has {count} values a row ({', '.join(found)}), but the model was made for {config.features}"
            f" ({', '.join(wanted or ())}): name these with --column"
        )


def _flat(data: Labeled) -> list[Any]:
    labels = data.labels or []
    return [x for label in labels for x in label] if data.columns.task == "tokens" else labels


class Collator:
    """Rows of `encoder` to a batch of tensors.

    Args:
        classifier: The model, whose dtype images get, and its processor.
        task: The task.
        columns: The columns of the loss, which become tensors.
    """

    def __init__(self, classifier: Classifier, task: str, columns: Sequence[str] = ()):
        self.classifier, self.task, self.columns = classifier, task, columns

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch, padded where rows differ in length."""
        import torch

        processor, dtype = self.classifier.processor, self.classifier.model.dtype
        if self.task == "table":
            batch = {"values": torch.tensor([row["values"] for row in rows])}
        elif self.task == "image":
            pictures = [row["image"].convert("RGB") for row in rows]
            batch = {"pixel_values": processor(pictures, return_tensors="pt")["pixel_values"].to(dtype)}
        else:
            names = [name for name in processor.model_input_names if name in rows[0]]
            batch = dict(processor.pad([{name: row[name] for name in names} for row in rows], return_tensors="pt"))
        batch |= {name: torch.tensor([row[name] for row in rows]) for name in self.columns if name in rows[0]}
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            batch["labels"] = torch.tensor(_padded(labels, processor) if self.task == "tokens" else labels)
        return batch


def _padded(labels: list[list[int]], tokenizer: Any) -> list[list[int]]:
    length = max(map(len, labels))
    fill = [[-100] * (length - len(row)) for row in labels]
    left = tokenizer.padding_side == "left"
    return [[*more, *row] if left else [*row, *more] for row, more in zip(labels, fill, strict=True)]

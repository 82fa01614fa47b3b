"""What a classifier's training checks and prepares: options with an effect, a head that fits, labels, class weights."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from .. import classes
from ..classes.base import ClassLoss
from ..classes.heads import classes_of, head_of
from ..patching.heads import inner_of
from .class_rows import IGNORED, RowReader


def check_effect(args: Any, loss: ClassLoss, second: nn.Module | None) -> None:
    """Raises: ValueError for an option without an effect under the loss."""
    if "second" not in loss.needs:
        given = [name for name in ("second", "momentum") if getattr(args, name) != getattr(type(args), name)]
        if given or second is not None:
            raise ValueError(f"{(given or ['second'])[0]} is given, but {loss!r} reads no second pass: leave it out")
    if args.gather and loss.per_row:
        raise ValueError(f"gather is True, but {loss!r} is a sum over rows, which needs none: leave it False")
    if args.class_weights is not None and not (loss.per_row and loss.labels == "classes"):
        raise ValueError(f"class_weights is given, but {loss!r} is no sum over rows of classes: leave it out")


def fit_head(model: Any, loss: ClassLoss) -> None:
    """Resizes the head. Raises: ValueError for what is no classifier, or a PEFT model that was not resized."""
    inner = inner_of(model)
    RowReader.refuse(inner)
    if RowReader.answers_questions(inner):
        return
    if not hasattr(model, "peft_config"):
        classes.resize(model, loss)
    elif not getattr(model.config, "hf_xent_loss", None):
        raise ValueError(
            f"model is a {type(model).__name__} whose head was not resized: call hf_xent.classes.resize(model,"
            f" {loss!r}) before the adapter is added"
        )
    elif (head := head_of(model)) is not None:
        loss.prepare(head, new=False)


def check_data(dataset: Any, loss: ClassLoss) -> None:
    """Raises: ValueError for a training set without a column of the loss, or with labels of another kind."""
    known = getattr(dataset, "column_names", None) or loss.columns  # not known before it is read
    if missing := [column for column in loss.columns if column not in known]:
        raise ValueError(
            f"train_dataset has the columns {', '.join(known)}, but {loss!r} needs {', '.join(missing)}: add the column"
        )
    _check_labels(dataset, loss)


def class_weights(given: Any, dataset: Any, model: Any) -> Tensor:
    """The weight of every class [K]. Raises: ValueError for weights that are not one number >= 0 a class."""
    count = classes_of(model)
    if given == "balanced":
        given = _balanced(dataset, count)
    weights = torch.as_tensor(given, dtype=torch.float32) if isinstance(given, list) else torch.empty(0)
    if weights.shape != (count,) or not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError(f"class_weights is {given!r}: give {count} numbers >= 0, or 'balanced'")
    return weights


def _check_labels(dataset: Any, objective: ClassLoss) -> None:
    """Refuses numbers where a loss reads ids of classes; only data sets whose types are known are looked at.

    Raises:
        ValueError: The column `labels` has floats.
    """
    feature: Any = (getattr(dataset, "features", None) or {}).get("labels")
    while hasattr(feature, "feature"):  # of a list
        feature = feature.feature
    if objective.labels != "values" and str(getattr(feature, "dtype", "")).startswith("float"):
        raise ValueError(
            f"train_dataset has {feature.dtype} in column labels, but {objective!r} is of classes: give their ids, or"
            " choose a loss of values such as squared_error or hl_gauss"
        )


def _balanced(dataset: Any, classes: int) -> list[float]:
    """N / (K N_k) for every class k, from the labels of a data set.

    Raises:
        ValueError: The labels cannot be read before training, or a class has none.
    """
    if "labels" not in (getattr(dataset, "column_names", None) or ()):
        raise ValueError("class_weights is 'balanced', which needs a train_dataset with a column labels: give numbers")
    counts = Counter(
        int(y) for part in dataset.with_format(None)["labels"] for y in (part if isinstance(part, list) else [part])
    )
    counts.pop(IGNORED, None)
    if absent := [k for k in range(classes) if not counts[k]]:
        raise ValueError(
            f"class_weights is 'balanced', but no row of train_dataset has class {absent[0]}: give numbers"
        )
    return [counts.total() / (classes * counts[k]) for k in range(classes)]

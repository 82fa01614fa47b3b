"""The head of a classifier under a loss of classes: its width, what it sees, and the classes its outputs stand for.

    resize(model, Aspects(8))                       # K classes before, K + 8 outputs now
    predict(model, model(**batch).logits)           # classes, also of a model that was saved and loaded

The loss is written into the configuration as `hf_xent_loss`, with the number of classes, and is saved with the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import get
from .base import ClassLoss
from .ordinal_head import share_direction


def resize(model: Any, loss: str | ClassLoss) -> None:
    """Gives a classifier of K labels the width that a loss needs.

    The last `nn.Linear` with as many outputs as the model has labels is replaced. A wider head of classes keeps the
    rows of the K classes; all other rows are drawn as transformers initialises a head (normal with `initializer_range`,
    no bias). A model that has this width already is left alone, but for the loss in its configuration. Under PEFT,
    call it before the adapter is added.

    Args:
        model: A classifier of transformers, such as AutoModelForSequenceClassification.
        loss: The loss, or its name.

    Raises:
        ValueError: The model has no such head, has too few classes, was resized for a loss of another width, or returns
            values (`return_values`).
    """
    loss, config = get(loss), getattr(model, "config", None)
    if config is None:
        raise ValueError(f"model is a {type(model).__name__} without configuration: pass a classifier of transformers")
    if config.num_labels != len(config.id2label):
        raise ValueError(
            f"model returns values in place of its {len(config.id2label)} logits: save it and load it to train these"
        )
    before = getattr(config, "hf_xent_loss", None)
    classes = classes_of(model)
    if classes < loss.least_classes:
        raise ValueError(
            f"model has num_labels={classes}, for which transformers takes labels for numbers, but {loss!r} is of"
            f" classes: load it with num_labels={loss.least_classes} or more"
        )
    width = loss.outputs(classes)
    if width != config.num_labels and before and config.num_labels != classes:
        raise ValueError(
            f"model was resized for {before} and has {config.num_labels} outputs, but {loss!r} needs {width}: load the"
            f" model before that, with num_labels={classes}"
        )
    if width != config.num_labels:
        _replace_head(model, loss, classes, width)
    elif (head := head_of(model)) is not None:
        share_direction(head, False)  # a loss before, in the same session, may have asked for it
        loss.prepare(head, new=False)
    config.hf_xent_loss = {**loss.describe(), "classes": classes}


def predict(model: Any, logits: Tensor) -> Tensor:
    """The classes [...] that a model's logits [..., W] stand for, under the loss that it was resized for, if any."""
    loss = loss_of(model)
    return logits.argmax(-1) if loss is None else loss.predict(logits)


def loss_of(model: Any) -> ClassLoss | None:
    """The loss that a model was resized for, read from its configuration; None for another model."""
    stored = dict(getattr(model.config, "hf_xent_loss", None) or {})
    if not stored:
        return None
    stored.pop("classes")
    return get(stored.pop("loss"), **stored)


def classes_of(model: Any) -> int:
    """The number K of a model's classes, whatever the width of its head."""
    stored = getattr(model.config, "hf_xent_loss", None)
    return int(stored["classes"] if stored else model.config.num_labels)


def head_of(model: Any) -> nn.Linear | None:
    """The last linear layer with an output for every label; under PEFT the one that is trained."""
    width = model.config.num_labels
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == width]
    return heads[-1] if heads else None


@contextmanager
def inputs_of(head: nn.Module) -> Iterator[list[Tensor]]:
    """While it is open, what a layer sees in each call is appended to a list."""
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _replace_head(model: Any, loss: ClassLoss, classes: int, width: int) -> None:
    """A head of another width in place of the last one with an output for every class, and its names of outputs."""
    config = model.config
    heads = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not heads:
        raise ValueError(
            f"model is a {type(model).__name__} without a linear layer of {classes} outputs: pass a classifier, such as"
            f" AutoModelForSequenceClassification with num_labels={classes}"
        )
    name, head = heads[-1]
    parent, _, last = name.rpartition(".")
    std = getattr(config, "initializer_range", 0.02)
    keep = loss.labels == "classes" and width > classes
    new = _resized(head, width, std, classes if keep else 0)
    loss.prepare(new, new=True)  # may refuse the head, and then the model is as it was
    setattr(model.get_submodule(parent), last, new)
    names = {i: config.id2label[i] for i in range(classes)} if keep else {}
    names |= {i: f"OUTPUT_{i}" for i in range(len(names), width)}
    config.id2label, config.label2id = names, {label: i for i, label in names.items()}
    if hasattr(model, "num_labels"):
        model.num_labels = width


def _resized(head: nn.Linear, width: int, std: float, kept: int) -> nn.Linear:
    """A layer of another width, whose first `kept` rows are those of `head`."""
    weight = head.weight
    new = nn.Linear(head.in_features, width, head.bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        new.weight.normal_(std=std)
        new.weight[:kept] = weight[:kept]
        if head.bias is not None:
            new.bias.zero_()
            new.bias[:kept] = head.bias[:kept]
    new.requires_grad_(weight.requires_grad)
    new.train(head.training)
    return new

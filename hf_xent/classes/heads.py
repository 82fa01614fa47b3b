"""The head of a classifier under a loss of classes: its width, and the classes that its outputs stand for.

    resize(model, Aspects(8))                       # K classes before, K + 8 outputs now
    predict(model, model(**batch).logits)           # classes, also of a model that was saved and loaded

The loss is written into the configuration as `hf_xent_loss`, with the number of classes, and is saved with the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import get
from .base import ClassLoss


def resize(model: Any, loss: str | ClassLoss) -> None:
    """Gives a classifier of K labels the width that a loss needs; the rows of the K classes stay as they are.

    The last `nn.Linear` with as many outputs as the model has labels is replaced; new rows are drawn as transformers
    initialises a head (normal with `initializer_range`, no bias). A model that has this loss and width already is left
    alone, but for the options of the loss in its configuration. Under PEFT, call it before the adapter is added.

    Args:
        model: A classifier of transformers, such as AutoModelForSequenceClassification.
        loss: The loss, or its name.

    Raises:
        ValueError: The model has no such head, or was resized for a loss of another width.
    """
    loss, config = get(loss), getattr(model, "config", None)
    if config is None:
        raise ValueError(f"model is a {type(model).__name__} without configuration: pass a classifier of transformers")
    before = getattr(config, "hf_xent_loss", None)
    classes = before["classes"] if before else config.num_labels
    width = loss.outputs(classes)
    if before and width != config.num_labels:
        raise ValueError(
            f"model was resized for {before} and has {config.num_labels} outputs, but {loss!r} needs {width}: load the"
            f" model before that, with num_labels={classes}"
        )
    if width != config.num_labels:
        name, head = _head(model, classes)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _widened(head, width, getattr(config, "initializer_range", 0.02)))
        names = {i: config.id2label[i] for i in range(classes)}
        names |= {i: f"OUTPUT_{i}" for i in range(classes, width)}
        config.id2label, config.label2id = names, {label: i for i, label in names.items()}
        if hasattr(model, "num_labels"):
            model.num_labels = width
    config.hf_xent_loss = {**loss.describe(), "classes": classes}


def predict(model: Any, logits: Tensor) -> Tensor:
    """The classes [...] that a model's logits [..., W] stand for, under the loss that it was resized for, if any."""
    stored = dict(getattr(model.config, "hf_xent_loss", None) or {})
    if not stored:
        return logits.argmax(-1)
    stored.pop("classes")
    return get(stored.pop("loss"), **stored).predict(logits)


def _head(model: Any, classes: int) -> tuple[str, nn.Linear]:
    """The last linear layer with an output for every class, and its name."""
    heads = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == classes]
    if not heads:
        raise ValueError(
            f"model is a {type(model).__name__} without a linear layer of {classes} outputs: pass a classifier, such as"
            f" AutoModelForSequenceClassification with num_labels={classes}"
        )
    return heads[-1]


def _widened(head: nn.Linear, width: int, std: float) -> nn.Linear:
    """A layer with more outputs, whose first rows are those of `head`."""
    weight = head.weight
    new = nn.Linear(head.in_features, width, head.bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        new.weight.normal_(std=std)
        new.weight[: head.out_features] = weight
        if head.bias is not None:
            new.bias.zero_()
            new.bias[: head.out_features] = head.bias
    new.requires_grad_(weight.requires_grad)
    new.train(head.training)
    return new

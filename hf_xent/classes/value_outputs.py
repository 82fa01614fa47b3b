"""Models that return the number their logits stand for, so that trainers of one-logit models train wider heads.

    trainer = RewardTrainer(return_values(model, "hl_gauss:low=-5, high=5"), args, train_dataset=dataset)

The mean over bins of HLGauss and TwoHot, or the expected class of Ordinal, is read by a forward hook on the head, and
`config.num_labels` is read as 1. Weights, their names and the saved configuration stay those of the wider head: a saved
model is loaded as any other, returns its logits again, and values once `return_values(model)` is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..ops.statistics import widened
from . import get
from .base import ClassLoss
from .heads import head_of, loss_of, resize

Model = TypeVar("Model", bound=nn.Module)


def return_values(model: Model, loss: str | ClassLoss | None = None) -> Model:
    """Makes a classifier return one number a row, as logits [B, 1] in float32 or wider.

    TRL's RewardTrainer then trains a head of bins or of thresholds by its own loss. Rewards of bins stay within `low`
    and `high`, expected classes within 0 and K - 1. An adapter is best added afterwards, with the head trained in full
    (`modules_to_save`, as PEFT does for the task SEQ_CLS), and not as an adapter on the head.

    Args:
        model: A classifier of transformers, such as AutoModelForSequenceClassification: with one label for HLGauss and
            TwoHot, with K labels for Ordinal of K classes.
        loss: The loss that the head is resized for, or its name. It can be left out for a model that was resized
            before, such as one that `ClassTrainer` has trained, or that was saved and loaded.

    Returns:
        The model itself. One that returns values already is left alone.

    Raises:
        ValueError: The loss is of classes without an order, the model was not resized for one, or it returns the
            values of another loss.
    """
    before = loss_of(model)
    wanted = before if loss is None else get(loss)
    if wanted is None:
        raise ValueError(
            f"model is a {type(model).__name__} that was not resized for a loss: pass one, such as"
            " 'hl_gauss:low=-5, high=5'"
        )
    config: Any = model.config
    if isinstance(config, _OneLabel):
        if wanted != before:
            raise ValueError(
                f"loss is {wanted!r}, but model returns the values of {before!r}: save the model and load it, and pass"
                " it then"
            )
        return model
    wanted.value(torch.zeros(1, wanted.outputs(2)))  # refuses before anything is changed
    if loss is not None:
        resize(model, wanted)
    head = head_of(model)
    if head is None:
        raise ValueError(f"model is a {type(model).__name__} without a linear layer of {config.num_labels} outputs")
    head.register_forward_hook(_Value(wanted))
    for module in model.modules():
        if getattr(module, "config", None) is config and hasattr(module, "num_labels"):
            module.num_labels = 1  # type: ignore[assignment]
    _read_as_one(config)
    return model


@dataclass(frozen=True)
class _Value:
    """A forward hook: the head's output as numbers. An object, so that copies of the layer have it too."""

    loss: ClassLoss

    def __call__(self, head: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self.loss.value(widened(output))[..., None]


class _OneLabel:
    """What is put before the class of a configuration, whose names of labels stay as they are and are saved."""

    num_labels = 1

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        plain: Any = object.__new__(type(self).__mro__[2])  # a class that a pickle finds under its name
        plain.__dict__.update(self.__dict__)
        return _read_as_one, (plain,)


def _read_as_one(config: Any) -> Any:
    """The configuration, whose number of labels is read as 1 from now on."""
    kind: Any = type(config)
    config.__class__ = _of_one_label(kind)
    return config


@cache
def _of_one_label(kind: type) -> type:
    return type(kind.__name__, (_OneLabel, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})

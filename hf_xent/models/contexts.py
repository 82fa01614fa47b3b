"""Contexts that change the mode of a model and restore it afterwards, also if an error is raised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..system import renamed


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in evaluation mode, without dropout; it does not disable gradients."""
    modes = [(module, module.training) for module in model.modules()]  # parts may be in another mode than the model
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eval_mode_without_autocast(model: Any) -> Iterator[None]:
    """As `eval_mode`, and without the autocast that accelerate puts around a model's forward for a trainer's bf16."""
    attributes = model.__dict__
    forward = attributes.get("forward")
    original = attributes.get("_original_forward")  # where accelerate keeps what it wrapped
    if original is not None:
        model.forward = original
    try:
        with eval_mode(model):
            yield
    finally:
        if original is not None:
            model.forward = forward


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)

"""A model's mode for a while: what looks at a model leaves it as it was, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In here a model is in evaluation mode, without dropout; gradients are as they were, see `torch.no_grad`."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """As `evaluating`, and without the autocast that accelerate puts around a model's forward for a trainer's bf16."""
    places = model.__dict__
    forward, own = places.get("forward"), places.get("_original_forward")  # where accelerate keeps what it wrapped
    if own is not None:
        model.forward = own
    try:
        with evaluating(model):
            yield
    finally:
        if own is not None:
            model.forward = forward

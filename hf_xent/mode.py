"""A model's mode for a while: what looks at a model leaves it as it was, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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

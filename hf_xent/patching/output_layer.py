"""The layer whose output is a model's logits: the one the model names, or the one that a part of it does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def output_layer_of(inner: nn.Module) -> nn.Module | None:
    """The output embeddings of a transformers model; None if it has none, or several parts that have their own.

    Some models name embeddings [V, D] in the place of the linear layer of that shape (FSMT), or leave it to their
    decoder to know (BLIP).
    """
    if not hasattr(inner, "get_output_embeddings"):
        return None
    layer = _named_by(inner)
    if layer is None and type(inner).forward is nn.Module.forward:  # a set of models, of which none runs by itself
        return None
    if layer is None:
        layers = list({id(found): found for found in _named_by_parts(inner)}.values())
        return layers[0] if len(layers) == 1 else None
    if isinstance(layer, nn.Embedding):
        alike = [m for m in inner.modules() if isinstance(m, nn.Linear) and m.weight.shape == layer.weight.shape]
        return alike[0] if len(alike) == 1 else layer
    return layer


def _named_by(module: Any) -> nn.Module | None:
    get = getattr(module, "get_output_embeddings", None)
    return get() if get else None


def _named_by_parts(module: nn.Module) -> Iterator[nn.Module]:
    """The output embeddings of the outermost parts that have some."""
    for part in module.children():
        layer = _named_by(part)
        if layer is None:
            yield from _named_by_parts(part)
        else:
            yield layer

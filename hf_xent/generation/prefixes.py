"""The keys and values that a model keeps of a beginning, so that several continuations of it are computed alone."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..patching import inner_of
from ..patching.calls import parameters_of

KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)
"""The layers of a cache that hold nothing else, and whose rows can be selected."""


def cache_name(model: Any) -> str:
    """The name of the keys and values in a model's inputs and outputs, which transformers 5.24 has changed."""
    kind: Any = type(inner_of(model))
    return "cache" if "cache" in parameters_of(kind) else "past_key_values"


def can_be_continued(model: Any) -> bool:
    """False for a recurrent model: its states cannot be continued by padded rows."""
    return not getattr(inner_of(model), "_is_stateful", False)


def kept(model: Any, output: Any) -> Any:
    """The keys and values in a model's output; None if it keeps other states, too, not all of which have rows."""
    past = getattr(output, cache_name(model), None)
    parts = [getattr(past, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    caches = [past] if None in parts else parts  # the parts are those of a decoder with an encoder
    layers = [layer for cache in caches for layer in getattr(cache, "layers", ())]
    return past if layers and all(type(layer) in KEYS_AND_VALUES for layer in layers) else None


def selected(past: Any, places: Tensor) -> Any:
    """A copy of keys and values, which the next forward pass appends to, with one row for each place [n]."""
    past = deepcopy(past)
    past.batch_select_indices(places)
    return past

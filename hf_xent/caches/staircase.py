"""A transformers cache in which tokens have fewer bits the older they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from .blocks import Schedule
from .layers import StaircaseLayer, StaircaseSlidingLayer


class StaircaseCache(DynamicCache):
    """TODO."""

    def __init__(
        self, config: PreTrainedConfig, bits: Iterable[int] = (8, 4, 2), residual_length: int = 64, group: int = 32
    ):
        schedule = Schedule(tuple(bits), residual_length, group)
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config={config!r}: give the model's configuration, model.config")
        super().__init__(config=config)
        self.schedule = schedule
        self.layers = [_staircase(layer, schedule) for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all layers keep: codes, their lo and hi, exact tokens, and states of other layers."""
        storages = (tensor.untyped_storage() for layer in self.layers for tensor in _tensors(layer))
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _staircase(layer: Any, schedule: Schedule) -> Any:
    """The layer that keeps what a layer of transformers keeps; layers of other kinds stay as they are."""
    if type(layer) is DynamicLayer:
        return StaircaseLayer(schedule)
    if type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > schedule.residual_length + 1:
        return StaircaseSlidingLayer(schedule, layer.sliding_window)
    return layer


def _tensors(thing: Any) -> Iterator[Tensor]:
    """All tensors of a layer, which has them as attributes or in containers."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, StaircaseLayer):
        yield from thing.tensors()
    elif isinstance(thing, (CacheLayerMixin, LinearAttentionCacheLayerMixin)):
        yield from _tensors(vars(thing))
    elif isinstance(thing, Mapping):
        yield from _tensors(list(thing.values()))
    elif isinstance(thing, (list, tuple)):
        for part in thing:
            yield from _tensors(part)

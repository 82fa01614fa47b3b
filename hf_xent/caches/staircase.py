"""A transformers cache in which tokens have fewer bits the older they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from .blocks import Schedule
from .layers import StaircaseLayer, StaircaseSlidingLayer


class StaircaseCache(DynamicCache):
    """A cache of keys and values for `generate` and `forward`: the newest tokens are exact, older ones have fewer bits.

    The newest tokens are the residual, which is exact. When it has S = `residual_length` tokens it becomes a block with
    `bits[0]` bits a number and the residual is empty; the block before it comes down to `bits[1]`, and so on; all that
    is older has the last. With bits = (8, 4, 2), after n tokens:

        tokens, the newest first      bits
        n mod S                       exact
        S                             8
        S                             4
        all the others                2

    Each group of numbers is stored as lo, hi, and codes: x ~ lo + code · (hi - lo) / (2^bits - 1). Keys share lo and hi
    over `group` neighbouring tokens of a channel in one block, values over `group` neighbouring channels of a token.
    lo and hi remain those of the exact numbers when a block gets fewer bits. As 255, 15, 3 and 1 divide one another by
    odd numbers, its codes are then what the exact numbers would give: stepping down adds no error.

    The source's pseudo-code counts the exact residual as the first level, so that what it calls B_2 is `bits[0]` here.
    It also says that the newest S tokens are exact: in its loop, and here, these are at most S - 1 between two calls.
    A call's own tokens are read exactly, however many they are: a prompt sees itself exactly.

    A layer of full attention is a staircase. A layer whose window is longer than S + 1 is one, too, and drops the
    blocks that have left the window; it holds up to S - 1 tokens more than the window. Any other layer (a shorter
    window, linear attention, a convolution, a mixture of both) keeps what transformers has for it.

    Numbers are made from codes at each call, one layer at a time: what is saved in memory is paid for in time. `crop`
    into a block makes the residual of its remaining tokens, as rounded as they are. While past tokens are recorded, as
    in assisted generation, tokens become a block at the `crop` that follows, when those that were refused are gone.
    For a model with an encoder, give `EncoderDecoderCache(StaircaseCache(config), DynamicCache(config=config))`.

    Source: F. Li, arXiv:2410.18441, staircase adaptive quantisation, which reports no measurements; the grouping is
    that of KIVI (arXiv:2402.02750).

    Args:
        config: The model's configuration.
        bits: Bits of the newest block, of the one before it, ...; all older ones have the last. Of 16, 8, 4, 2 and 1;
            16 keeps the states as they are. One number is for all blocks alike: 4 is flat, 16 a `DynamicCache`.
        residual_length: S, tokens of a block.
        group: Numbers that share lo and hi, which are stored in the type of the states: at 32, one bit a number for
            states of 16 bits and two for float32.

    Raises:
        TypeError: `config` is no configuration.
        ValueError: Bits that are not known or grow with age, a length below 1, or a model for which transformers has no
            cache or in which no layer would be a staircase.
    """

    layers: list[Any]

    def __init__(
        self,
        config: PreTrainedConfig,
        bits: Sequence[int] | int = (8, 4, 2),
        residual_length: int = 64,
        group: int = 32,
    ):
        levels = (bits,) if isinstance(bits, int) else tuple(bits)
        self.schedule = Schedule(levels, residual_length, group)
        if not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config is a {type(config).__name__}: give the model's configuration, model.config")
        name = type(config).__name__
        try:
            super().__init__(config=config)
        except (AttributeError, KeyError) as error:  # no layers, or layers of a kind that has no cache
            raise ValueError(f"config of {name}: transformers has no cache for it ({error})") from error
        self.layers = [_staircase(layer, self.schedule) for layer in self.layers]
        if not any(isinstance(layer, StaircaseLayer) for layer in self.layers):
            raise ValueError(f"config of {name}: {_why_none(self.layers, residual_length)}; or use DynamicCache")

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


def _why_none(layers: Sequence[Any], residual_length: int) -> str:
    """Why no layer of a model is a staircase."""
    windows = {layer.sliding_window for layer in layers if type(layer) is DynamicSlidingWindowLayer}
    if windows:
        return (
            f"its window of {max(windows)} is no longer than residual_length={residual_length} + 1: give a smaller one"
        )
    return f"none of its layers is attention alone, but {', '.join(sorted({type(layer).__name__ for layer in layers}))}"


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

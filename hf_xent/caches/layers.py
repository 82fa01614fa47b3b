"""Layers of a transformers cache that keep keys and values as staircases, of full attention and of sliding windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .blocks import Schedule, Staircase
from .quantiser import Groups

KEYS, VALUES = -2, -1
"""What shares lo and hi: keys of neighbouring tokens in one channel, values of neighbouring channels of one token."""


class StaircaseLayer(DynamicLayer):
    """A layer of full attention.

    Args:
        schedule: Which block has how many bits.
        **options: What the layer of transformers takes.
    """

    record_past = False
    keep: int | None = None

    def __init__(self, schedule: Schedule, **options: Any):
        self.schedule = schedule
        self.stairs: tuple[Staircase, ...] = ()
        self.cumulative_length = 0
        super().__init__(**options)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take sizes, type and device from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.stairs = tuple(
            Staircase(self.schedule, Groups(axis, self.schedule.group), like)
            for axis, like in ((KEYS, key_states), (VALUES, value_states))
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens.

        Args:
            key_states: (batch, heads, new tokens, width).
            value_states: The same of the values.
            *args: Not read.
            **kwargs: Not read.

        Returns:
            Keys and values of all tokens that the mask expects. Those of this call and of the residual are exact.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, held = key_states.shape[2], len(self.stairs[0])
        if self.record_past:  # a second update without a crop in between: what came before it can be settled
            for stair in self.stairs:
                stair.settle()
        self.cumulative_length += new
        keys, values = (s.extended(x) for s, x in zip(self.stairs, (key_states, value_states), strict=True))
        for stair in self.stairs:
            if self.record_past:
                stair.residual = stair.residual.clone()
            else:
                stair.settle(self.keep)
        visible = held + new if self.keep is None else min(self.keep, held) + new
        return keys[:, :, held + new - visible :], values[:, :, held + new - visible :]

    def activate_past_recording(self) -> None:
        """From now on `update` leaves its tokens exact, for a `crop` to remove some before they become a block."""
        self.record_past = True

    def get_seq_length(self) -> int:
        """How many tokens have come."""
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens.

        Args:
            tokens_to_remove: Minus their number, as in transformers since 5.24; or a positive number of tokens to
                keep, as before.
        """
        if not self.is_initialized:
            return
        if tokens_to_remove > 0:
            tokens_to_remove = min(tokens_to_remove - self.cumulative_length, 0)
        removed = min(-tokens_to_remove, self.cumulative_length)
        self.cumulative_length -= removed
        for stair in self.stairs:
            stair.crop(max(len(stair) - removed, 0))
            stair.settle(self.keep)

    def reset(self) -> None:
        """Forget all tokens."""
        self.stairs, self.cumulative_length, self.is_initialized = (), 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each row the tokens of another.

        Args:
            beam_idx: (batch,), the row whose tokens each gets.
        """
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row.

        Args:
            repeats: How often.
        """
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows.

        Args:
            indices: Their numbers, or a mask.
        """
        self._map(lambda tensor: tensor[indices])

    def offload(self) -> None:
        """Move what is kept to the CPU."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move what is kept to the device of the states."""
        if self.is_initialized:
            self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept."""
        for stair in self.stairs:
            yield from stair.tensors()

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for stair in self.stairs:
            stair.map(change)

    def _dense(self, which: int) -> Tensor | None:
        return self.stairs[which].dense() if self.is_initialized else None

    def _refuse(self, states: Tensor | None) -> None:
        if states is not None:  # None is what the layers of transformers begin with
            raise AttributeError("keys and values of a staircase cannot be assigned: give them to update()")

    keys = property(lambda self: self._dense(0), _refuse, doc="All keys as numbers, made when they are asked for.")
    values = property(lambda self: self._dense(1), _refuse, doc="All values as numbers, made when they are asked for.")


class StaircaseSlidingLayer(StaircaseLayer, DynamicSlidingWindowLayer):
    """A layer of sliding-window or chunked attention: blocks that the window has left are dropped.

    Args:
        schedule: Which block has how many bits.
        sliding_window: Tokens that a query sees, itself included.
    """

    def __init__(self, schedule: Schedule, sliding_window: int):
        self.keep = sliding_window - 1
        super().__init__(schedule, sliding_window=sliding_window)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens, and drop what the window has left.

        Args:
            tokens_to_remove: Minus their number.

        Raises:
            RuntimeError: The window is full, and the tokens before it were not recorded.
        """
        if self.is_initialized and self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RuntimeError("tokens that the sliding window has left are gone: call activate_past_recording first")
        super().crop(tokens_to_remove)

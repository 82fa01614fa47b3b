"""Keys or values of one layer as a staircase: an exact residual, and blocks with fewer bits the older they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .quantiser import BITS, Groups, dequantise, pack, quantise, requantise, unpack

EXACT = 16
"""The level that keeps the states as they are, whatever their type."""


@dataclass(frozen=True)
class Schedule:
    """Which block has how many bits.

    Args:
        bits: Bits of the newest block, of the one before, and so on; all older blocks have the last. 16 is exact.
        residual_length: Tokens of a block, and of the residual that becomes one.
        group: Numbers that share lo and hi.

    Raises:
        ValueError: Bits that are not known, or that grow with age; or a length or a group below 1.
    """

    bits: tuple[int, ...]
    residual_length: int
    group: int

    def __post_init__(self) -> None:
        levels = (EXACT, *BITS)
        if not self.bits or any(type(b) is not int or b not in levels for b in self.bits):
            raise ValueError(f"bits={self.bits}: give one or more of {levels}, the newest block's first")
        if any(newer < older for newer, older in pairwise(self.bits)):
            raise ValueError(f"bits={self.bits} grow with age: give the newest block's first, the fewest last")
        for name in ("residual_length", "group"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}: give a whole number, at least 1")

    @property
    def first(self) -> int:
        """Bits of the codes that a block's numbers first become; those of fewer bits are found from these."""
        return next(b for b in self.bits if b != EXACT)


@dataclass
class Blocks:
    """Blocks of neighbouring age that have the same bits.

    Args:
        bits: Their bits.
        data: (batch, heads, blocks, tokens, ...), the states of an exact block, or else packed codes.
        bounds: lo and hi of their groups, from when the blocks were exact; none for exact blocks.
    """

    bits: int
    data: Tensor
    bounds: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return self.data.shape[2]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Blocks:
        """The blocks with a change made to each tensor."""
        return Blocks(self.bits, change(self.data), tuple(change(bound) for bound in self.bounds))

    def part(self, start: int, stop: int) -> Blocks:
        """Some of the blocks, as views."""
        return self.mapped(lambda tensor: tensor[:, :, start:stop])

    def fill(self, out: Tensor, groups: Groups) -> None:
        """Write the numbers of the blocks, (batch, heads, blocks, tokens, width)."""
        if self.bits == EXACT:
            out.copy_(self.data)
        else:
            low, high = self.bounds
            dequantise(self.data, low, high, self.bits, groups, out)

    def reduced(self, bits: int, first: int, width: int, groups: Groups) -> Blocks:
        """The blocks with fewer bits, by way of `first` if they are exact; those that have so few are returned."""
        if bits >= self.bits:
            return self
        if self.bits == EXACT:
            states = self.data.detach()
            low, high = groups.bounds(states)
            codes = requantise(quantise(states, low, high, first, groups), first, bits)
            return Blocks(bits, pack(codes, bits), (low, high))
        codes = torch.empty((*self.data.shape[:-1], width), dtype=torch.uint8, device=self.data.device)
        codes = requantise(unpack(self.data, self.bits, codes), self.bits, bits)
        return Blocks(bits, pack(codes, bits), self.bounds)


def joined(parts: Sequence[Blocks]) -> Blocks:
    """Blocks of the same bits one after another, in memory of their own."""
    data = torch.cat([part.data for part in parts], dim=2)
    bounds = tuple(torch.cat(bound, dim=2) for bound in zip(*(part.bounds for part in parts), strict=True))
    return Blocks(parts[0].bits, data, bounds)


class Staircase:
    """Keys or values of one layer.

    Args:
        schedule: Which block has how many bits.
        groups: How numbers share lo and hi: keys along the tokens, values along the channels.
        like: (batch, heads, any, width), states whose sizes, type and device are those of what will come.
    """

    def __init__(self, schedule: Schedule, groups: Groups, like: Tensor):
        self.schedule, self.groups = schedule, groups
        self.blocks: list[Blocks] = []  # the oldest first
        self.residual = like[:, :, :0].clone()

    @property
    def count(self) -> int:
        """How many blocks there are."""
        return sum(map(len, self.blocks))

    def __len__(self) -> int:
        return self.count * self.schedule.residual_length + self.residual.shape[2]

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept."""
        for blocks in self.blocks:
            yield from (blocks.data, *blocks.bounds)
        yield self.residual

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change each tensor, whose first axis is the batch."""
        self.blocks = [blocks.mapped(change) for blocks in self.blocks]
        self.residual = change(self.residual)

    def extended(self, states: Tensor) -> Tensor:
        """Add tokens to the residual, exactly; `settle` makes blocks of it.

        Args:
            states: (batch, heads, new tokens, width).

        Returns:
            (batch, heads, all tokens, width): older blocks as their codes have them, the residual and the new tokens
            exactly.
        """
        exact = self.residual.shape[2] + states.shape[2]
        full = self.dense(states) if len(self) else states
        self.residual = full[:, :, full.shape[2] - exact :]
        return full

    def dense(self, states: Tensor | None = None) -> Tensor:
        """All tokens as numbers, (batch, heads, tokens, width), and those of `states` after them."""
        states = self.residual[:, :, :0] if states is None else states
        old, size = len(self), self.schedule.residual_length
        full = states.new_empty((*states.shape[:2], old + states.shape[2], states.shape[3]))
        start = 0
        for blocks in self.blocks:
            stop = start + len(blocks) * size
            blocks.fill(full[:, :, start:stop].unflatten(2, (len(blocks), size)), self.groups)
            start = stop
        full[:, :, start:old] = self.residual
        full[:, :, old:] = states
        return full

    def settle(self, keep: int | None = None) -> None:
        """Make blocks of the residual's tokens if it is full, and give each block the bits of its age.

        What remains of the residual gets memory of its own: `extended` left it a view of all tokens.

        Args:
            keep: Tokens that will be read again: blocks that are older than all of them are dropped. None is all.
        """
        size = self.schedule.residual_length
        new = self.residual.shape[2] // size
        pool = list(self.blocks)
        if new:
            pool.append(Blocks(EXACT, self.residual[:, :, : new * size].unflatten(2, (new, size))))
        surplus = 0 if keep is None else max(len(self) - keep, 0) // size
        self.residual = self.residual[:, :, new * size :].clone()
        if new or surplus:
            self.blocks = list(self._arranged(pool, surplus))

    def crop(self, kept: int) -> None:
        """Keep the oldest tokens: those of a block that is cut become the residual, as its codes have them.

        A block never gets bits back: one that is now newer keeps its fewer bits until its age asks for even fewer.

        Args:
            kept: How many tokens remain.
        """
        size = self.schedule.residual_length
        whole, rest = divmod(kept, size)
        if whole >= self.count:
            self.residual = self.residual[:, :, : kept - self.count * size].clone()
            return
        cut = joined(list(self._span(self.blocks, whole, whole + 1)))
        states = self.residual.new_empty((*self.residual.shape[:2], 1, size, self.residual.shape[3]))
        cut.fill(states, self.groups)
        self.residual = states[:, :, 0, :rest].clone()
        self.blocks = [joined([part]) for part in self._span(self.blocks, 0, whole)]

    @staticmethod
    def _span(pool: Sequence[Blocks], start: int, stop: int) -> Iterator[Blocks]:
        """The blocks from one number to another, counted from the oldest."""
        for blocks in pool:
            if start < len(blocks) and stop > 0:
                yield blocks.part(max(start, 0), min(stop, len(blocks)))
            start, stop = start - len(blocks), stop - len(blocks)

    def _arranged(self, pool: Sequence[Blocks], surplus: int) -> Iterator[Blocks]:
        """The blocks without the oldest ones, each with the bits of its age: all the older ones first, as one."""
        count, bits = sum(map(len, pool)), self.schedule.bits
        edges = [surplus, *range(max(count - len(bits) + 1, surplus), count + 1)]
        levels = reversed(bits[: len(edges) - 1])
        for (start, stop), level in zip(pairwise(edges), levels, strict=True):
            parts = [self._reduced(part, level) for part in self._span(pool, start, stop)]
            if parts:
                yield joined(parts)

    def _reduced(self, blocks: Blocks, level: int) -> Blocks:
        return (
            blocks
            if level == EXACT
            else blocks.reduced(level, self.schedule.first, self.residual.shape[3], self.groups)
        )

"""The asymmetric group quantiser, whose codes of 8, 4, 2 and 1 bits nest, and how codes are packed into bytes.

Numbers of a group, between lo and hi, become whole numbers, their codes, which stand for even steps from lo to hi:

    step = (hi - lo) / (2^bits - 1),   code = round((x - lo) / step),   x ~ lo + code · step

255, 15, 3 and 1 steps divide one another by odd numbers, so codes of fewer bits are found from codes of more:

    code' = round(code / f),   f = (2^bits - 1) / (2^fewer - 1) = 17, 5, 3 or a product of these

As f is odd, no code lies halfway between two coarser ones, and where a coarser code begins a finer one begins, too.
Rounding twice is therefore rounding once: 2 bits found by way of 8 and 4 are those of the numbers themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.statistics import widened

BITS = (8, 4, 2, 1)
"""Bits of a code whose levels nest and which fill a byte."""


@dataclass(frozen=True)
class Groups:
    """How numbers are grouped: `size` neighbours along an axis share lo and hi; the last group may be smaller.

    Args:
        axis: -1, channels of one token; or -2, tokens of one channel.
        size: Numbers of a group.
    """

    axis: int
    size: int

    def bounds(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest number of each group.

        Args:
            states: Numbers of any shape and float type.

        Returns:
            lo and hi in the type of the states, which holds both exactly, for they are numbers of the group. The axis
            is ceil(length / size) long.
        """
        parts = states.split(self.size, dim=self.axis)
        if len(parts) > 1 and parts[0].shape == parts[-1].shape:  # one operation instead of one a group
            grouped = torch.aminmax(states.unflatten(self.axis, (len(parts), self.size)), dim=self.axis)
            return grouped.min, grouped.max
        ends = [torch.aminmax(part, dim=self.axis, keepdim=True) for part in parts]
        return torch.cat([end.min for end in ends], self.axis), torch.cat([end.max for end in ends], self.axis)

    def grouped(self, x: Tensor, groups: int) -> Tensor:
        """Numbers with their axis viewed as (groups, size); or as (length, 1) where the last group is smaller."""
        length = x.shape[self.axis]
        sizes = (groups, length // groups) if self._even(length, groups) else (length, 1)
        return x.unflatten(self.axis, sizes)

    def spread(self, bound: Tensor, length: int) -> Tensor:
        """One number a group, made to broadcast over what `grouped` gives for an axis of this length."""
        if not self._even(length, bound.shape[self.axis]):
            bound = bound.repeat_interleave(self.size, dim=self.axis).narrow(self.axis, 0, length)
        return bound.unsqueeze(self.axis)

    def _even(self, length: int, groups: int) -> bool:
        return groups == 1 or length == groups * self.size


def quantise(states: Tensor, low: Tensor, high: Tensor, bits: int, groups: Groups) -> Tensor:
    """The codes of numbers, round((x - lo) / step).

    Args:
        states: Numbers of any shape.
        low: The smallest number of each group, from `Groups.bounds`.
        high: The largest number of each group.
        bits: Bits of a code.
        groups: How the numbers are grouped.

    Returns:
        Codes, one a byte, in the shape of the states.
    """
    start, length = widened(low), states.shape[groups.axis]
    step = (widened(high) - start) / (2**bits - 1)
    step = step.where(step > 0, torch.ones_like(step))  # a group of equal numbers has the code 0
    numbers = groups.grouped(widened(states), low.shape[groups.axis]) - groups.spread(start, length)
    codes = (numbers / groups.spread(step, length)).round_().to(torch.uint8)
    return codes.reshape(states.shape)


def requantise(codes: Tensor, bits: int, fewer: int) -> Tensor:
    """Codes of fewer bits from codes of more, round(code / f), with the same lo and hi.

    Args:
        codes: Codes of `bits` bits, one a byte.
        bits: Their bits.
        fewer: The bits to be had, no more than `bits`.

    Returns:
        Codes in the same shape.
    """
    factor = (2**bits - 1) // (2**fewer - 1)
    if factor == 1:
        return codes
    return torch.div(codes.to(torch.int16) + factor // 2, factor, rounding_mode="floor").to(torch.uint8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes in as few bytes as hold them: 8 / bits along the last axis share a byte.

    Byte j holds the codes j, j + n, j + 2n, ... where n is the number of bytes, lowest bits first: bytes are then
    unpacked a plane at a time.

    Args:
        codes: (..., width), codes of `bits` bits, one a byte.
        bits: Bits of a code.

    Returns:
        (..., ceil(width · bits / 8)), bytes.
    """
    planes = 8 // bits
    width = codes.shape[-1]
    size = -(-width // planes)
    packed = codes[..., :size].clone()
    for plane in range(1, planes):
        part = codes[..., plane * size : (plane + 1) * size]
        packed[..., : part.shape[-1]] |= part << (plane * bits)
    return packed


def unpack(packed: Tensor, bits: int, out: Tensor) -> Tensor:
    """Codes that `pack` made bytes of.

    Args:
        packed: Bytes.
        bits: Bits of a code.
        out: (..., width), where the codes are written, in any type.

    Returns:
        `out`.
    """
    size, planes = packed.shape[-1], 8 // bits
    for plane in range(planes):
        part = out[..., plane * size : (plane + 1) * size]
        codes = packed[..., : part.shape[-1]]
        codes = codes >> (plane * bits) if plane else codes
        part.copy_(codes & (2**bits - 1) if plane < planes - 1 else codes)
    return out


def dequantise(packed: Tensor, low: Tensor, high: Tensor, bits: int, groups: Groups, out: Tensor) -> None:
    """The numbers that packed codes stand for, lo + code · step, computed in float32 whatever the type of `out` is.

    Args:
        packed: Bytes from `pack`.
        low: The smallest number of each group, from `Groups.bounds`.
        high: The largest number of each group.
        bits: Bits of a code.
        groups: How the numbers are grouped.
        out: Where the numbers are written, in the shape of the states.
    """
    start, length = widened(low), out.shape[groups.axis]
    step = (widened(high) - start) / (2**bits - 1)
    numbers = out if out.dtype == step.dtype else torch.empty(out.shape, dtype=step.dtype, device=out.device)
    grouped = groups.grouped(unpack(packed, bits, numbers), low.shape[groups.axis])
    grouped.mul_(groups.spread(step, length)).add_(groups.spread(start, length))
    if numbers is not out:
        out.copy_(numbers)

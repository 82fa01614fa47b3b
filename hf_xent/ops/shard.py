"""A vocabulary that is split over the ranks of a process group (tensor parallelism), and the collectives on it.

Hidden states and labels are the same on every rank; weight, bias and adapter are a rank's rows of the head. A
tensor that every rank has in full is *replicated*, one that has to be summed over ranks is *partial*:

    copy_to_ranks       replicated -> partial        backward: the sum over ranks
    sum_ranks           partial -> replicated        backward: the identity
    gather_from_ranks   columns [..., V_r] -> [..., V]
    gather_rows         rows [V_r, ...] -> [V, ...]

Each of the first two is the backward of the other, so that derivatives of any order are correct.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Shard:
    """Which tokens of a vocabulary a rank's head holds: those from `start` on. The group's other ranks hold the others.

    The vocabulary is cut as DTensor cuts it: `width` tokens per rank, fewer on the last ranks.

    Args:
        group: The `torch.distributed.ProcessGroup` over which the vocabulary is split.
        start: The first token of this rank.
        size: The number of tokens of the whole vocabulary, on all ranks.
    """

    group: Any  # torch.distributed.ProcessGroup
    start: int
    size: int

    @cached_property
    def width(self) -> int:
        """The largest number of tokens on any rank."""
        return -(-self.size // self.group.size())


def copy_to_ranks(hidden: Tensor, shard: Shard | None) -> Tensor:
    """Hidden states, for products with a part of the head on every rank; their gradient is summed over the ranks."""
    return hidden if shard is None else _CopyToRanks.apply(hidden, shard.group)


def gather_from_ranks(local: Tensor, shard: Shard | None) -> Tensor:
    """The columns of all ranks [..., V] from those of this rank [..., V_r]."""
    if shard is None:
        return local
    return sum_ranks(F.pad(local, (shard.start, shard.size - shard.start - local.shape[-1])), shard)


def gather_rows(local: Tensor, shard: Shard) -> Tensor:
    """The rows of all ranks [V, ...] from those of this rank [V_r, ...]; the gradient is that of this rank's rows."""
    after = shard.size - shard.start - len(local)
    return sum_ranks(F.pad(local, (0, 0) * (local.ndim - 1) + (shard.start, after)), shard)


def sum_ranks(part: Tensor, shard: Shard) -> Tensor:
    """The sum of all ranks' parts; each part gets the gradient.

    It is written over `part`, which must be a new tensor that no backward needs.
    """
    return _SumRanks.apply(part, shard.group)


class _CopyToRanks(torch.autograd.Function):
    """The identity from replicated to partial; its backward is `_SumRanks`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        return _SumRanks.apply(upstream.clone(memory_format=torch.contiguous_format), ctx.group), None


class _SumRanks(torch.autograd.Function):
    """The sum from partial to replicated; its backward is `_CopyToRanks`."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group = group
        ctx.mark_dirty(part)
        dist.all_reduce(part, group=group)
        return part

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        return _CopyToRanks.apply(upstream, ctx.group), None

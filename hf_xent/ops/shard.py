"""A head whose vocabulary is split over the ranks of a process group (tensor parallelism): `Shard`, `meet`, `gather`.

Hidden states, labels, statistics and their upstream gradients are the same on every rank; weight, bias and adapter are
a rank's rows of the head's. Each rank folds its own columns; a few floats a token then make the statistics of the whole
row, with w_r = exp(lse_r - lse) the mass of rank r:

    lse = log sum_r e^lse_r     mean = sum_r (V_r / V) mean_r     entropy = sum_r w_r (H_r - log w_r)
    payload = sum_r w_r payload_r     variance = sum_r w_r (Var_r + (log w_r - H_r)^2) - entropy^2
    log_sum_sq = log sum_r w_r^2 e^sq_r

The gradient of a rank's logits needs nothing else; only the hidden states' is a sum over ranks. One collective of
[statistics, N] floats a chunk of rows and one of [N, D], where gathered logits would be [N, V].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

if TYPE_CHECKING:
    from .algebra import Problem


@dataclass(frozen=True, eq=False)
class Shard:
    """Which tokens of a vocabulary of `size` a rank's head holds: those from `start` on; the group's ranks the others.

    Cut as DTensor cuts: `width` tokens a rank, fewer on the last ones.
    """

    group: Any  # torch.distributed.ProcessGroup
    start: int
    size: int

    @cached_property
    def width(self) -> int:
        """The tokens of the widest rank."""
        return -(-self.size // self.group.size())


def meet(problem: Problem, values: dict[str, Tensor], rows: slice = slice(None)) -> dict[str, Tensor]:
    """Statistics [N] of whole rows from those over this rank's columns; `values` itself for a head that is whole."""
    head = problem.head
    if head.shard is None:
        return values
    places = problem.places[rows]
    here = (places >= 0) & (places < head.size)
    mine = {**values, "target": torch.where(here, values["target"], 0.0)}
    if "mean" in mine:
        mine["mean"] = mine["mean"] * (head.size / head.shard.size)
    if "top" in mine:
        top = mine["top"]
        best = replace(head, shard=None)[top]  # of the columns here
        raw = torch.linalg.vecdot(
            best.joined().weight.to(mine["lse"].dtype), problem.hidden[rows].to(mine["lse"].dtype)
        )
        mine["peak"] = head.activate(raw if best.bias is None else raw + best.bias)
        mine["top"] = (top + head.shard.start).to(raw.dtype)  # exact: no vocabulary has 2^24 tokens
    names = sorted(mine)
    parts = _all_gather(torch.stack([mine[name] for name in names]), head.shard.group)  # [ranks, statistics, N]
    part = dict(zip(names, parts.unbind(1), strict=True))
    lse = part["lse"].logsumexp(0)
    log_w = part["lse"] - lse
    w, log_w = log_w.exp(), log_w.clamp(min=-1e4)
    found = {"lse": lse, "target": part["target"].sum(0)}
    if "mean" in part:
        found["mean"] = part["mean"].sum(0)
    if "payload" in part:
        found["payload"] = (w * part["payload"]).sum(0)
    if "entropy" in part:
        found["entropy"] = (w * (part["entropy"] - log_w)).sum(0)
    if "variance" in part:
        second = part["variance"] + (log_w - part["entropy"]) ** 2
        found["variance"] = (w * second).sum(0) - found["entropy"] ** 2
    if "log_sum_sq" in part:
        found["log_sum_sq"] = (part["log_sum_sq"] + 2 * log_w).logsumexp(0)
    if "top" in part:
        found["top"] = part["top"].gather(0, part["peak"].argmax(0, keepdim=True)).squeeze(0).long()
    return found


def add_up(problem: Problem, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients whose parts lie on all ranks, summed in place: those of hidden states."""
    if problem.head.shard is not None:
        for name in ("hidden", "payload_hidden"):
            if name in grads:
                dist.all_reduce(grads[name], group=problem.head.shard.group)
    return grads


def enter(hidden: Tensor, shard: Shard | None) -> Tensor:
    """What is the same on every rank, into a product with a part of the head; its gradient is the sum of all parts'."""
    return hidden if shard is None else _Enter.apply(hidden, shard.group)


def gather(local: Tensor, shard: Shard | None) -> Tensor:
    """A rank's columns [..., V_r] into those of all ranks [..., V]."""
    if shard is None:
        return local
    return total(F.pad(local, (shard.start, shard.size - shard.start - local.shape[-1])), shard)


def total(part: Tensor, shard: Shard) -> Tensor:
    """The sum of all ranks' parts, in place of this rank's own, which must be fresh; each part gets the gradient."""
    return _Total.apply(part, shard.group)


def _all_gather(x: Tensor, group: Any) -> Tensor:
    found = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(found.unbind(0)), x.contiguous(), group=group)
    return found


class _Enter(torch.autograd.Function):
    """The identity from replicated to partial; its backward is `_Total`, whose backward it is: right in any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        return _Total.apply(upstream.clone(memory_format=torch.contiguous_format), ctx.group), None


class _Total(torch.autograd.Function):
    """The sum of partial ones, replicated."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:
        ctx.group = group
        ctx.mark_dirty(part)
        dist.all_reduce(part, group=group)
        return part

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        return _Enter.apply(upstream, ctx.group), None

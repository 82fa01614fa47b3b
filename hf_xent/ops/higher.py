"""Derivatives beyond the first, and those that see through torch's own operations alone.

A streamed gradient is written in place, outside of any graph: right once. When a backward is itself to be
differentiated (`create_graph=True`), its gradients are taken anew from dense logits, one chunk of rows at a time. With
F(u, x) a sum over tokens (u the upstream gradients, x the tensors of the problem) and v what comes from above,

    g(u, x) = grad_x F(u, x)          <v, dg> = grad <v, grad_x F(u, x)>

and <v, grad_x F> is a sum over tokens again. So one Function serves every order, in the memory of a chunk's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from .algebra import TENSORS, Problem, wide

ROWS = ("hidden", "payload_hidden")  # of TENSORS: those cut into chunks, the others are whole in each


def composed(*tensors: Tensor | None) -> bool:
    """Whether torch.func or forward-mode differentiation is at work: both need a graph of torch's own operations."""
    if torch._C._are_functorch_transforms_active():
        return True
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def gradients(
    problem: Problem,
    value: Callable[..., Tensor],  # (rows, statistics of these rows, *upstream) -> the chunk's share of F
    upstream: Sequence[Tensor],  # [N], cut into chunks, or [], whole in each
) -> tuple[Tensor | None, ...]:
    """Gradients of F for every tensor in `problem.needs`, in the order of TENSORS, with a graph of any order."""
    labels, hollow = problem.labels, problem.with_tensors((None,) * len(TENSORS), None)
    count = len(upstream)

    def part(rows: slice, *given: Tensor | None) -> Tensor:
        chunk = hollow.with_tensors(given[count:], labels[rows])
        return value(rows, reference.forward(chunk), *given[:count])

    cut = (*(x.ndim > 0 for x in upstream), *(name in ROWS for name in TENSORS))
    wanted = tuple(count + i for i, name in enumerate(TENSORS) if name in problem.needs)
    found = iter(_Gradient.apply(_Sum(part, problem.rows(), cut, wanted), *upstream, *problem.tensors))
    return tuple(next(found) if name in problem.needs else None for name in TENSORS)


@dataclass(frozen=True)
class _Sum:
    """A sum over tokens, as a function of tensors: `part` is the share of a chunk of rows."""

    part: Callable[..., Tensor]  # (rows, *tensors), those of `cut` already cut
    chunks: list[slice]
    cut: tuple[bool, ...]  # which tensors have a row a token
    wanted: tuple[int, ...]  # which tensors get a gradient

    def gradients(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """By the wanted tensors, added up over the chunks in a wide dtype."""
        found = {}
        for i in self.wanted:
            x = tensors[i]
            assert x is not None  # nobody asks for the gradient of what is not there
            found[i] = (x, torch.zeros_like(x, dtype=wide(x.dtype), memory_format=torch.contiguous_format))
        for rows in self.chunks:
            pieces = zip(tensors, self.cut, strict=True)
            leaves = [None if x is None else (x[rows] if cut else x).detach() for x, cut in pieces]
            with torch.enable_grad():
                for i in self.wanted:
                    leaves[i].requires_grad_()  # type: ignore[union-attr]  # as above
                total = self.part(rows, *leaves)
            if not total.requires_grad:
                continue
            grads = torch.autograd.grad(total, [leaves[i] for i in self.wanted], allow_unused=True)  # type: ignore[misc]
            for i, grad in zip(self.wanted, grads, strict=True):
                if grad is not None:
                    place = found[i][1]
                    (place[rows] if self.cut[i] else place).add_(grad)
        return tuple(total.to(x.dtype) for x, total in found.values())

    def along(self, wanted: tuple[int, ...], count: int) -> _Sum:
        """The inner product of this sum's gradients with `count` directions, which come before its tensors."""

        def part(rows: slice, *given: Tensor | None) -> Tensor:
            directions, own = given[:count], list(given[count:])
            for i in self.wanted:
                x = own[i]
                if x is not None and not x.requires_grad:
                    own[i] = x.detach().requires_grad_()
            total = self.part(rows, *own)
            product = torch.zeros((), dtype=total.dtype, device=total.device)
            if not total.requires_grad:
                return product
            inputs: Any = [own[i] for i in self.wanted]
            grads = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
            for direction, grad in zip(directions, grads, strict=True):
                if direction is not None and grad is not None:
                    product = product + (direction * grad).sum()
            return product

        cut = (*(self.cut[i] for i in self.wanted), *self.cut)
        return _Sum(part, self.chunks, cut, tuple(count + i for i in wanted))


class _Gradient(torch.autograd.Function):
    """The gradients of a sum as a function that can be differentiated, by the gradient of another sum."""

    @staticmethod
    def forward(ctx: Any, total: _Sum, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.total = total
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return total.gradients(tensors)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        wanted = tuple(i for i in range(len(tensors)) if ctx.needs_input_grad[1 + i])
        again = ctx.total.along(wanted, len(directions))
        given = (*directions, *tensors)
        found = _Gradient.apply(again, *given) if torch.is_grad_enabled() else again.gradients(given)
        grads = dict(zip(wanted, found, strict=True))
        return None, *(grads.get(i) for i in range(len(tensors)))

"""Higher derivatives, and the check for modes of differentiation that only torch's own operations support.

A streamed gradient is written in place, outside of any graph, so it has no derivative. When a backward is itself to be
differentiated (`create_graph=True`), its gradients are computed again from dense logits, one chunk of rows at a time.
With F(u, x) a sum over tokens (u the upstream gradients, x the tensors of the problem) and v the upstream gradients of
the gradients,

    g(u, x) = grad_x F(u, x)          <v, dg> = grad <v, grad_x F(u, x)>

and <v, grad_x F> is a sum over tokens again. So one Function serves every order, in the memory of one chunk of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from .problem import TENSORS, Problem
from .statistics import wide

Pairs = Iterable[tuple[Tensor | None, Tensor | None]]  # outputs, each with its upstream gradient
ROWS = ("hidden", "payload_hidden")  # those of TENSORS that have one row per token, cut into chunks


def under_function_transform(*tensors: Tensor | None) -> bool:
    """Whether torch.func, forward-mode differentiation or batched gradients (`is_grads_batched`) are at work.

    They transform torch's operations, but not the custom functions of this package: dense logits are needed then.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    return any(
        forward_ad.unpack_dual(t).tangent is not None or torch._C._functorch.is_legacy_batchedtensor(t)
        for t in tensors
        if t is not None
    )


def gradients(
    problem: Problem,
    outputs: Callable[[slice, dict[str, Tensor]], list[Tensor]],  # (rows, their statistics) -> an output per upstream
    upstream: Sequence[Tensor],  # [N], cut into chunks, or [], the same in each chunk
) -> tuple[Tensor | None, ...]:
    """Gradients of `F = sum(upstream * outputs)` for every tensor in `problem.needs`, in the order of TENSORS, with a
    graph of any order.
    """
    labels, without_tensors = problem.labels, problem.without_tensors()
    count = len(upstream)

    def part(rows: slice, *operands: Tensor | None) -> Pairs:
        chunk = without_tensors.with_tensors(operands[count:], labels[rows])
        return zip(outputs(rows, reference.forward(chunk)), operands[:count], strict=True)

    cut = (*(x.ndim > 0 for x in upstream), *(name in ROWS for name in TENSORS))
    wanted = tuple(count + i for i, name in enumerate(TENSORS) if name in problem.needs)
    grads = iter(_Sum(part, problem.rows(), cut, wanted).differentiable((*upstream, *problem.tensors)))
    return tuple(next(grads) if name in problem.needs else None for name in TENSORS)


@dataclass(frozen=True)
class _Sum:
    """A sum of inner products <output, upstream> over tokens, as a function of tensors; `part` is a chunk's."""

    part: Callable[..., Pairs]  # (rows, *tensors), with only these rows of `cut` tensors
    chunks: list[slice]
    cut: tuple[bool, ...]  # which tensors have one row per token
    wanted: tuple[int, ...]  # which tensors get a gradient; never the upstream gradients of this sum

    def differentiable(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The gradients by the wanted tensors, with a graph if grad mode is on."""
        create_graph = torch.is_grad_enabled()
        if not under_function_transform(*tensors):
            return _Gradient.apply(self, *tensors) if create_graph else self.gradients(tensors)
        with torch.enable_grad():
            # views, so that the gradient by one tensor leaves out what reaches it through another (tied embeddings)
            views = [x.view_as(x) if x is not None and i in self.wanted else x for i, x in enumerate(tensors)]
        grads = self._grad(slice(None), views, create_graph=create_graph)
        wanted: Any = [tensors[i] for i in self.wanted]
        return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True))

    def gradients(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The same gradients without a graph, summed over the chunks in a wide dtype."""
        wanted: Any = [tensors[i] for i in self.wanted]  # none of them is None
        contiguous = torch.contiguous_format
        sums = [torch.zeros_like(x, dtype=wide(x.dtype), memory_format=contiguous) for x in wanted]
        for rows in self.chunks:
            pairs = zip(tensors, self.cut, strict=True)
            leaves = [None if x is None else (x[rows] if cut else x).detach() for x, cut in pairs]
            for i, total, grad in zip(self.wanted, sums, self._grad(rows, leaves, create_graph=False), strict=True):
                if grad is not None:
                    (total[rows] if self.cut[i] else total).add_(grad)
        return tuple(total.to(x.dtype) for x, total in zip(wanted, sums, strict=True))

    def along(self, wanted: tuple[int, ...], count: int) -> _Sum:
        """The inner product of this sum's gradients with `count` directions, which come before its tensors."""

        def part(rows: slice, *operands: Tensor | None) -> Pairs:
            return zip(self._grad(rows, list(operands[count:]), create_graph=True), operands[:count], strict=True)

        cut = (*(self.cut[i] for i in self.wanted), *self.cut)
        return _Sum(part, self.chunks, cut, tuple(count + i for i in wanted))

    def _grad(self, rows: slice, tensors: list[Tensor | None], *, create_graph: bool) -> tuple[Tensor | None, ...]:
        """The gradients of one part by the wanted tensors, of which those without a graph become leaves."""
        with torch.enable_grad():
            for i in self.wanted:
                x = tensors[i]
                assert x is not None
                tensors[i] = x if x.requires_grad else x.detach().requires_grad_()
            pairs = [(x, g) for x, g in self.part(rows, *tensors) if x is not None and g is not None]
        pairs = [(x, g) for x, g in pairs if x.requires_grad]
        if not pairs:
            return (None,) * len(self.wanted)
        inputs: Any = [tensors[i] for i in self.wanted]
        outputs, upstream = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, inputs, upstream, create_graph=create_graph, allow_unused=True)


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
        product = ctx.total.along(wanted, len(directions))
        grads = dict(zip(wanted, product.differentiable((*directions, *tensors)), strict=True))
        return None, *(grads.get(i) for i in range(len(tensors)))

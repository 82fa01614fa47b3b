"""A lazy tensor's value, and its place in the graph: how both come from the head's operands."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..ops import Head


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a lazy tensor's value comes from the head's operands."""

    inner: float = 1.0
    outer: float | None = None  # None: no tanh
    log_probs: bool = False  # log_softmax on top

    @property
    def is_regular(self) -> bool:
        """Whether its factors can be multiplied and divided by: none is zero, infinite, or near it."""
        return all(1e-30 < abs(factor) < 1e30 for factor in (self.inner, self.outer) if factor is not None)

    def head(self, raw: Head) -> Head:
        """The head, on the operands of one without scale, whose activated logits the value is (before log_softmax)."""
        if self.outer is None:
            return replace(raw, scale=self.inner)
        return replace(raw, scale=self.inner * self.outer, softcap=self.outer)

    def value(self, hidden: Tensor, raw: Head) -> Tensor:
        """The dense value."""
        z = self.head(raw).logits(hidden)
        return z.log_softmax(-1) if self.log_probs else z

    def times(self, factor: float) -> Recipe:
        """The recipe of `factor` times the value."""
        if self.outer is None:
            return replace(self, inner=self.inner * factor)
        return replace(self, outer=self.outer * factor)


class Connected(torch.autograd.Function):
    """Gives the wrapper a place in the graph; its backward serves consumers that took dense values below Python."""

    @staticmethod
    def forward(
        ctx: Any, kind: type[Tensor], raw: Head, recipe: Recipe, layout: Tensor, place: Any, *tensors: Tensor | None
    ) -> Tensor:
        """A wrapper of class `kind` that is laid out as `layout`, with `place` its dtype and device."""
        ctx.save_for_backward(*tensors)
        without_tensors: dict[str, Any] = dict.fromkeys(("weight", "bias", "adapter"))
        ctx.head = replace(raw, **without_tensors)  # no tensor outlives the graph through ctx
        ctx.recipe, ctx.dtype = recipe, place["dtype"]
        lazy: Any = torch.Tensor._make_wrapper_subclass(kind, layout.shape, strides=layout.stride(), **place)
        ctx.memory = lazy.memory = []
        return lazy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        """Gradients of the operands, from the value computed again."""
        if any(not values.is_inference() and values._version for values in ctx.memory):
            raise RuntimeError(
                "logits were written to in place, and a custom autograd function got them as well, where their gradient"
                " does not know of it: give the function out.logits.dense()"
            )
        needs = ctx.needs_input_grad[-len(ctx.saved_tensors) :]
        twice = torch.is_grad_enabled()  # create_graph=True: these gradients are to be differentiated again
        with torch.enable_grad():
            # a view keeps the graph, and keeps what one operand owes to another (tied embeddings) out of its gradient
            inputs = [
                None if t is None else t.view_as(t) if twice and need else t.detach().requires_grad_(need)
                for t, need in zip(ctx.saved_tensors, needs, strict=True)
            ]
            hidden, weight, bias, adapter = inputs
            raw = replace(ctx.head, weight=weight, bias=bias, adapter=adapter)
            value = ctx.recipe.value(hidden, raw).to(upstream.device, ctx.dtype)
        wanted = [t for t, need in zip(inputs, needs, strict=True) if t is not None and need]
        grads = iter(torch.autograd.grad(value, wanted, upstream, create_graph=twice))
        return None, None, None, None, None, *(next(grads) if need else None for need in needs)


class Values(torch.autograd.Function):
    """The dense values of a wrapper whose place in the graph is not its operands'."""

    @staticmethod
    def forward(ctx: Any, lazy: Any) -> Tensor:
        """What the operands give; the graph goes on with the wrapper's."""
        return lazy.compute_values().detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        """The gradient as it is."""
        return upstream


def without_hooks() -> AbstractContextManager[Any]:
    """A context whose graph keeps its tensors as they are: a checkpoint's, which computes again what it saved, must not
    count what is made once and outlives it.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return nullcontext() if hooks is None else saved_tensors_hooks(Tensor.detach, lambda saved: saved)

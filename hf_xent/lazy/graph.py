"""How a lazy tensor's value, and its node in the autograd graph, are made from the head's operands."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..ops import Head


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a lazy tensor's value is computed from the head's operands."""

    inner: float = 1.0
    outer: float | None = None  # None: no tanh
    log_probs: bool = False  # log_softmax on top

    @property
    def is_regular(self) -> bool:
        """Whether its factors are safe to multiply and divide by: none is zero or infinite, or close to that."""
        return all(1e-30 < abs(factor) < 1e30 for factor in (self.inner, self.outer) if factor is not None)

    def head(self, raw: Head) -> Head:
        """`raw`, a head without scale and softcap, with those of the recipe; it makes the value before log_softmax."""
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
    """Connects the wrapper to the graph; its backward is for code that read dense values below Python."""

    @staticmethod
    def forward(
        ctx: Any,
        wrapper: type[Tensor],
        raw: Head,
        recipe: Recipe,
        like: Tensor,
        options: Any,
        *tensors: Tensor | None,
    ) -> Tensor:
        """A tensor of class `wrapper` with the shape and strides of `like`; `options` are its dtype and device."""
        ctx.save_for_backward(*tensors)
        ctx.head = raw.with_tensors(None, None, None, None)  # no tensor outlives the graph through ctx
        ctx.recipe, ctx.dtype = recipe, options["dtype"]
        lazy: Any = torch.Tensor._make_wrapper_subclass(wrapper, like.shape, strides=like.stride(), **options)
        ctx.memory = lazy.memory = []
        return lazy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        """The gradients of the operands; the value is computed again."""
        if was_written(ctx.memory):
            raise RuntimeError(
                "logits were written to in place and also passed to a custom autograd function, whose gradient ignores"
                " the write: give the function out.logits.dense()"
            )
        hidden, *weights = ctx.saved_tensors
        if not hidden.is_meta and any(x is not None and x.is_meta for x in weights):
            raise RuntimeError(
                "logits were passed to a custom autograd function, but the head's weight is there only while the head"
                " is called: give the function out.logits.dense()"
            )
        needs = ctx.needs_input_grad[-len(ctx.saved_tensors) :]
        create_graph = torch.is_grad_enabled()  # these gradients are to be differentiated again
        with torch.enable_grad():
            inputs = apart(ctx.saved_tensors, needs, create_graph)
            hidden, *tensors = inputs
            value = ctx.recipe.value(hidden, ctx.head.with_tensors(*tensors)).to(upstream.device, ctx.dtype)
        differentiable = [t for t, need in zip(inputs, needs, strict=True) if t is not None and need]
        grads = iter(torch.autograd.grad(value, differentiable, upstream, create_graph=create_graph))
        return None, None, None, None, None, *(next(grads) if need else None for need in needs)


def was_written(memory: list[Tensor]) -> bool:
    """Whether values that were kept have been written to in place."""
    return any(not values.is_inference() and values._version for values in memory)


def apart(tensors: Sequence[Tensor | None], needs: Sequence[bool], create_graph: bool) -> list[Any]:
    """The tensors of a function as the inputs of another computation of it, each with a gradient of its own.

    If its gradients are to be differentiated again they are views, which keep the graph, and leave out what reaches one
    of them through another (tied embeddings).
    """
    return [
        None if t is None else t.view_as(t) if create_graph and need else t.detach().requires_grad_(need)
        for t, need in zip(tensors, needs, strict=True)
    ]


class Values(torch.autograd.Function):
    """The dense values of a wrapper that a custom autograd function returned, and whose graph is therefore its own."""

    @staticmethod
    def forward(ctx: Any, lazy: Any) -> Tensor:
        """The values, from the operands; the graph continues at the wrapper."""
        return lazy.compute_values().detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        """The gradient, unchanged."""
        return upstream


def without_save_hooks() -> AbstractContextManager[Any]:
    """A context in which the graph saves tensors unchanged: the hooks of a checkpoint, which computes saved tensors
    again, must not count tensors that are computed once and outlive it.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return nullcontext() if hooks is None else saved_tensors_hooks(Tensor.detach, lambda saved: saved)

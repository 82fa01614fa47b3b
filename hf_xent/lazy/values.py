"""The values of a lazy tensor: when they are computed, how long they are kept, and whose memory they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..ops import Head
from ..ops.higher import under_function_transform
from .functions import shares_no_memory
from .graph import Recipe, Values, without_save_hooks
from .operands import Operands, check, version
from .source import Compute, Source
from .state import PatchState
from .wrappers import Hook, hooked, pass_through


class LazyTensor(torch.Tensor):
    """A wrapper around a head's operands that computes values from them; `LazyLogits` handles torch functions."""

    hidden: Tensor  # [..., D]
    raw: Head  # without scale and softcap
    recipe: Recipe
    state: PatchState
    differentiable: bool  # whether its values have a graph
    parent: tuple[LazyTensor, Callable[[Tensor], Tensor]] | None  # the tensor whose memory this is a view of, and how
    dense_values: Tensor | None  # the dense tensor, once something needed it
    copied_values: Tensor | None  # the values of a view that was only read, computed without those of its base
    product_of: Tensor | None  # the part of `hidden` that the head's weight multiplies, before others were appended
    operands: Operands  # the inputs of the head, as they were when it was called
    memory: list[Tensor]  # `dense_values`, shared with the wrapper's graph node, which checks whether it was written to
    reads: set[int]  # ids of the tensors of one head output from which a gradient passes to the operands directly
    source: Source | None  # where the weights are, if they are there during a call of the head only
    hooks: list[Hook]  # of wrappers, for the gradients of what is computed from these logits
    copy_of: LazyTensor | None = None  # the tensor of which this is a copy, made without a graph

    def check_operands(self) -> None:
        """Raises: RuntimeError if an operand was changed in place since the head was called."""
        check(self.operands, unread=self.differentiable and not self.reads)

    def note_read(self, reader: int) -> None:
        """Remember that something differentiable was computed from the operands without the dense logits."""
        if self.differentiable and torch.is_grad_enabled():
            self.reads.add(reader)

    @property
    def is_dense(self) -> bool:
        """Whether the dense values exist; from then on they are used, since they may have been written to.

        They are also computed if a custom autograd function returned the wrapper: then only the wrapper has its graph.
        """
        if self.dense_values is None and requires_grad_of(self) and not self.differentiable and not self.reconnect():
            self.dense_values = Values.apply(self)
        return self.has_values

    def reconnect(self) -> bool:
        """Continue the graph of the lazy tensor that a wrapper's autograd function has returned; False for others."""
        with torch._C.DisableTorchFunctionSubclass():
            hook = pass_through(self.grad_fn)
        base = self.copy_of if self.parent is None else self.parent[0]
        if hook is None or base is None:
            return False
        self.hidden, self.raw, self.differentiable = base.hidden, base.raw, base.differentiable
        self.hooks = [*base.hooks, hook]
        if self.parent is not None:  # a view, which a copy is not
            self.parent = (base, lambda d: d.view_as(d))
        return True

    def with_raw(self, compute: Compute) -> Any:
        """`compute(hidden, raw)`, in a call of the head if its weights are there only then."""
        if self.source is None:
            return compute(self.hidden, self.raw)
        constant = not self.differentiable
        return self.source(self.hidden, lambda hidden, raw: compute(hidden, raw.detach() if constant else raw))

    @property
    def has_values(self) -> bool:
        """Whether the dense values were computed, or those of the tensor that this is a view of."""
        return self.dense_values is not None or (self.parent is not None and self.parent[0].has_values)

    def dense(self) -> Tensor:
        """The ordinary tensor, computed once and kept, with autograd. That of a view shares the memory of its base.

        Returns:
            The logits [..., V].

        Raises:
            RuntimeError: The values do not exist yet, and an operand was changed in place since the head was called.
        """
        if self.is_dense and self.dense_values is not None:
            return self.dense_values
        if self.parent is not None:
            base = self.parent[0].dense()
            with torch.set_grad_enabled(self.differentiable):
                self.dense_values = self.parent[1](base)
        else:
            self.dense_values = self.compute_values()
        self.dense_values = hooked(self.hooks, self.dense_values)
        self.memory.append(self.dense_values)
        self.copied_values = None
        return self.dense_values

    def readable_values(self) -> Tensor:
        """The dense values, to be read only: those of a view of few rows are computed without the other rows."""
        if self.is_dense or not self.is_part():
            return self.dense()
        self.note_read(id(self))
        if self.copied_values is None:
            with torch.inference_mode(False):  # so that torch counts writes to it
                self.copied_values = self.compute_values()
        return self.copied_values

    def is_part(self) -> bool:
        """Whether this is a view that is computed alone: smaller than its base, or unlike it without a graph."""
        base = self
        while base.parent is not None:
            base = base.parent[0]
        return self.numel() < base.numel() or self.differentiable != base.differentiable

    def compute_values(self) -> Tensor:
        """The dense values from the operands; nothing is kept."""
        self.check_operands()
        self.state.materialized += 1
        device = self.hidden.device.type
        with (
            torch.set_grad_enabled(self.differentiable),
            torch.autocast(device, enabled=False),
            without_save_hooks(),
        ):
            return self.with_raw(self.recipe.value).to(self.device, self.dtype)


def run_on_views(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of a function that only reads its lazy arguments; NotImplemented if it does more or none is a view.

    It runs on the values of the views alone. If its result shares their memory, or if they were written to, the
    function has to run again on the memory of their bases.
    """
    lazies = [x for x in tree_leaves((args, kwargs)) if isinstance(x, LazyTensor)]
    if under_function_transform() or all(x.is_dense or not x.is_part() for x in lazies):
        return NotImplemented
    values = [x.readable_values() for x in lazies]
    versions, memory = [version(v) for v in values], {v.untyped_storage()._cdata for v in values}
    result = func(*map_lazy(LazyTensor.readable_values, args), **map_lazy(LazyTensor.readable_values, kwargs))
    if not all(shares_no_memory(leaf, memory) for leaf in tree_leaves(result)):
        return NotImplemented
    if versions != [version(v) for v in values]:
        for x in lazies:
            x.copied_values = None  # it has what should be written to the base
        return NotImplemented
    return result


def meta_like(x: LazyTensor) -> Tensor:
    """A meta tensor with the shape and strides of x: operations on it show what torch would do to x's values."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def is_view(result: Tensor, base: Tensor) -> bool:
    """Whether a result shares the memory of `base`."""
    return result.untyped_storage()._cdata == base.untyped_storage()._cdata


def requires_grad_of(lazy: LazyTensor) -> bool:
    """Whether the wrapper is part of a graph."""
    with torch._C.DisableTorchFunctionSubclass():
        return lazy.requires_grad


def map_lazy(fn: Callable[[LazyTensor], Tensor], tree: Any) -> Any:
    """A tree of arguments with every lazy tensor x replaced by `fn(x)`."""
    return tree_map(lambda x: fn(x) if isinstance(x, LazyTensor) else x, tree)


def densify(tree: Any) -> Any:
    """A tree of arguments with every lazy tensor replaced by its dense tensor."""
    return map_lazy(LazyTensor.dense, tree)

"""What an expression over lazy logits is made of, without any values: a graph of operations on inputs with equal rows.

    Product     the rows [..., D] of a model's hidden states and its head: their product has rows of length V
    Rows        a tensor with the same leading dimensions and 1, V or a few columns
    Shared      a tensor that is the same for every row: [V], or a number
    Operation   a torch function of other nodes; it works on each row alone

Nodes never change: an operation on the leading dimensions (a mask, a slice) gives a graph over other inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..ops import Head
from .graph import Recipe
from .operands import Operands, check, version
from .state import PatchState
from .wrappers import Hook

MARK = 0  # among the reads of a lazy tensor: it was recorded, though nothing was computed from it yet


@dataclass(frozen=True, eq=False)
class Product:
    """The operands of a head's product, as `LazyLogits` has them."""

    hidden: Tensor  # [..., D]
    raw: Head
    operands: Operands
    reads: set[int]
    hooks: tuple[Hook, ...]
    state: PatchState

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a gradient can flow to."""
        return (self.hidden, *(x for x in self.raw.tensors.values() if x is not None))

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Product:
        """The same product of other tensors."""
        weights = (None if x is None else change(x) for x in self.raw.tensors.values())
        return replace(self, hidden=change(self.hidden), raw=self.raw.with_tensors(*weights))

    def with_rows(self, change: Callable[[Tensor], Tensor]) -> Product:
        """Other rows of the same product."""
        return replace(self, hidden=change(self.hidden))

    def check(self) -> None:
        """Raises: RuntimeError if an operand was changed in place since the head was called."""
        differentiable = any(x.requires_grad for x in self.tensors)
        check(self.operands, unread=differentiable and self.reads <= {MARK})
        if differentiable and torch.is_grad_enabled():
            self.reads.add(id(self.reads))


@dataclass(frozen=True, eq=False)
class Rows:
    """A tensor with rows; its version is that which it had when it was recorded."""

    tensor: Tensor  # [..., 1 or more]
    version: int | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a gradient can flow to."""
        return (self.tensor,)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """The same for another tensor."""
        self.check()
        changed = change(self.tensor)
        return Rows(changed, version(changed))

    with_rows = with_tensors

    def check(self) -> None:
        """Raises: RuntimeError if the tensor was changed in place since."""
        if self.version != version(self.tensor):
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} was combined with logits that are computed when they are"
                " read, and was modified in place since: read the result before that, or pass a clone of the tensor"
            )


@dataclass(frozen=True, eq=False)
class Shared:
    """A tensor that is not cut into rows, a copy."""

    tensor: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a gradient can flow to."""
        return (self.tensor,)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Shared:
        """The same for another tensor."""
        return Shared(change(self.tensor))

    def with_rows(self, change: Callable[[Tensor], Tensor]) -> Shared:
        """Itself: it has no rows."""
        return self

    def check(self) -> None:
        """Nobody else has the copy."""


@dataclass(frozen=True, eq=False)
class Operation:
    """A torch function; its arguments are trees with nodes among their leaves."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Operation:
        """The function of these arguments."""
        return Operation(function, args, kwargs)


Input = Product | Rows | Shared
Node = Input | Operation


def logits(product: Product, recipe: Recipe) -> Node:
    """The node of what a recipe makes of a product."""
    node: Node = Operation.of(_activated, product, recipe)
    return Operation.of(torch.log_softmax, node, -1) if recipe.log_probs else node


def _activated(raw: Tensor, recipe: Recipe) -> Tensor:
    z = raw if recipe.inner == 1 else raw * recipe.inner
    return z if recipe.outer is None else torch.tanh(z) * recipe.outer


def inputs_of(node: Node) -> list[Input]:
    """The inputs of a graph, each object once."""
    found: dict[int, Input] = {}
    waiting, seen = [node], set[int]()
    while waiting:
        x = waiting.pop()
        if isinstance(x, Operation):
            if id(x) not in seen:
                seen.add(id(x))
                waiting += [leaf for leaf in reversed(tree_leaves((x.args, x.kwargs))) if isinstance(leaf, Node)]
        else:
            found[id(x)] = x
    return [*found.values()]


def map_inputs(node: Node, change: Callable[[Any], Any]) -> Node:
    """The same graph over other inputs."""
    memo: dict[int, Any] = {id(x): change(x) for x in inputs_of(node)}
    return _rebuilt(node, memo)


def _rebuilt(node: Any, memo: dict[int, Any]) -> Any:
    if isinstance(node, Operation) and id(node) not in memo:
        args, kwargs = tree_map(lambda x: _rebuilt(x, memo), (node.args, node.kwargs))
        memo[id(node)] = Operation(node.function, args, kwargs)
    return memo[id(node)] if isinstance(node, Node) else node


def evaluate(node: Any, given: dict[int, Tensor]) -> Any:
    """The value of a graph, from those of its inputs by their id; what is found is added to `given`."""
    if isinstance(node, Operation) and id(node) not in given:
        args, kwargs = tree_map(lambda x: evaluate(x, given), (node.args, node.kwargs))
        given[id(node)] = node.function(*args, **kwargs)
    return given[id(node)] if isinstance(node, Node) else node


def grouped(inputs: list[Input]) -> tuple[list[list[Product]], list[Rows], list[Shared]]:
    """Inputs by kind; products of the same operands are together, since they are multiplied once."""
    products: dict[Any, list[Product]] = {}
    for x in inputs:
        if isinstance(x, Product):
            weight = () if isinstance(x.raw.weight, Tensor) else (id(x.raw.weight),)
            names = [name for name, t in x.raw.tensors.items() if t is not None]
            key = (*weight, *names, x.raw.fp32, *map(_identity, x.tensors))
            products.setdefault(key, []).append(x)
    rest = [x for x in inputs if not isinstance(x, Product)]
    return [*products.values()], [x for x in rest if isinstance(x, Rows)], [x for x in rest if isinstance(x, Shared)]


def same_rows(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A change of rows that gives the same tensor again for the same tensor, so that products stay together."""
    memo: dict[Any, Tensor] = {}

    def once(x: Tensor) -> Tensor:
        key = _identity(x)
        if key not in memo:
            memo[key] = change(x)
        return memo[key]

    return once


def _identity(x: Tensor) -> Any:
    """What tells whether two tensors are one: the object if it has a gradient, else its memory."""
    if x.requires_grad or x.numel() == 0:
        return id(x)
    return (x.data_ptr(), x.shape, x.stride(), x.dtype)


def leaves_of(node: Node) -> Iterator[Tensor]:
    """All tensors of a graph, those of an input together."""
    for x in inputs_of(node):
        yield from x.tensors

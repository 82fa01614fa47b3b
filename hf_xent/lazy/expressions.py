"""`LazyExpression`: what torch functions make of lazy logits, recorded as long as it has rows of a vocabulary.

A divergence of two models is an expression in both models' logits: softmaxes, products, logarithms, a mask of tokens,
and a sum. It is recorded until something with fewer numbers is asked for (a sum over the vocabulary, or over all),
which is then computed a chunk of rows at a time (`hf_xent.ops.joint`), with its gradients. Whatever else is done to it
makes the dense tensor, once, with autograd, as for lazy logits.

Logits are recorded if the losses of their model are computed outside of it: `patch(model, always=True)`, or within
`lazily(model)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops.joint import stream_rows
from ..ops.request import Request
from .answering import Answering
from .answers import Answer
from .graph import apart, was_written, without_save_hooks
from .nodes import MARK, Input, Node, Operation, Product, evaluate, grouped, inputs_of, leaves_of, map_inputs, same_rows
from .state import PatchState
from .values import is_view, meta_like, requires_grad_of
from .wrappers import Hook, hooked


class LazyExpression(Answering):
    """A tensor [..., V] that is a function of lazy logits and has not been computed.

    Attributes:
        node: What it is a function of, and which (`hf_xent.lazy.nodes`).
        front: How many dimensions come before those of the rows: 1 for a stack of expressions, else 0.
        is_dense: Whether the dense values exist.
    """

    node: Node
    front: int
    answers: ClassVar[dict[Any, Answer]] = {}  # `shapes` registers them

    def retain_grad(self) -> None:
        """Keep the gradient of these values in `.grad`, as in torch; this makes them dense."""
        self.check_gradient("retain_grad()", self.reads)
        self.dense().retain_grad()

    def register_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        """Call a hook with the gradient of these values, as in torch; this makes them dense."""
        self.check_gradient("register_hook()", self.reads)
        return self.dense().register_hook(hook)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # mypy drops keywords' names in dunder methods
        state = "dense" if self.is_dense else "not computed"
        return f"LazyExpression(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, {state})"

    def check_operands(self) -> None:
        """Raises: RuntimeError if an input was changed in place since."""
        for x in inputs_of(self.node):
            x.check()

    def reconnect(self) -> bool:
        """Wrappers' functions get logits, not expressions."""
        return False

    def compute_values(self) -> Tensor:
        """The dense values; nothing is kept."""
        self.check_operands()
        for state in states_of(inputs_of(self.node)):
            state.materialized += 1
        with (
            torch.set_grad_enabled(self.differentiable),
            torch.autocast(self.device.type, enabled=False),
            without_save_hooks(),
        ):
            value = dense_value(self.node, self.shape).to(self.dtype)
            strides = value.stride() == self.stride() or self.parent is not None
            return value if strides else torch.empty_strided(self.shape, self.stride(), dtype=self.dtype,
                                                             device=self.device).copy_(value)  # fmt: skip

    def with_rows(self, change: Callable[[Tensor], Tensor], on_dense: Callable[[Tensor], Tensor]) -> LazyExpression:
        """Other rows: a view if the same operation gives a view of the dense tensor, else a copy."""
        before = meta_like(self)
        after, once = on_dense(before), same_rows(change)
        node = map_inputs(self.node, lambda x: x.with_rows(once))
        if is_view(after, before):
            return express(node, after, self.device, parent=(self, on_dense), reads=self.reads)
        self.note_read(MARK)
        return express(node, after, self.device)

    def copied(self, *, contiguous: bool = False) -> LazyExpression:
        """The same values in memory of their own, with these strides or those of a contiguous tensor."""
        self.note_read(MARK)
        strides = torch.contiguous_format if contiguous else torch.preserve_format
        layout = torch.empty_like(meta_like(self), memory_format=strides)
        return express(self.node, layout, self.device, front=self.front)

    def cast(self, dtype: torch.dtype) -> LazyExpression:
        """The same numbers in another dtype."""
        self.note_read(MARK)
        layout = torch.empty_like(meta_like(self), dtype=dtype)
        return express(Operation.of(Tensor.to, self.node, dtype), layout, self.device, front=self.front)

    def detached(self) -> LazyExpression:
        """A view without a graph."""
        node = map_inputs(self.node, lambda x: x.with_tensors(Tensor.detach))
        return express(node, meta_like(self), self.device, front=self.front, parent=(self, Tensor.detach))


class Recorded(torch.autograd.Function):
    """Connects an expression to the graph; its backward is for code that read dense values below Python."""

    @staticmethod
    def forward(ctx: Any, node: Node, layout: Tensor, device: torch.device, *tensors: Tensor) -> Tensor:
        """An expression with the shape, strides and dtype of `layout`; `tensors` are all that the node has."""
        ctx.node = node
        ctx.save_for_backward(*tensors)
        lazy: Any = torch.Tensor._make_wrapper_subclass(
            LazyExpression, layout.shape, strides=layout.stride(), dtype=layout.dtype, device=device
        )
        ctx.memory = lazy.memory = []
        return lazy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        """The gradients of the inputs; the value is computed again."""
        if was_written(ctx.memory):
            raise RuntimeError(
                "an expression over logits was written to in place and also passed to a custom autograd function, whose"
                " gradient ignores the write: give the function its .dense()"
            )
        create_graph, needs = torch.is_grad_enabled(), ctx.needs_input_grad[3:]
        with torch.enable_grad():
            views = apart(ctx.saved_tensors, needs, create_graph)
            rest = iter(views)
            node = map_inputs(ctx.node, lambda x: x.with_tensors(lambda _: next(rest)))
            value = dense_value(node, upstream.shape).to(upstream.dtype)
        wanted = [t for t, need in zip(views, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(value, wanted, upstream, create_graph=create_graph, allow_unused=True))
        return None, None, None, *(next(grads) if need else None for need in needs)


def express(
    node: Node,
    layout: Tensor,
    device: torch.device,
    *,
    front: int = 0,
    parent: Any = None,
    reads: set[int] | None = None,
) -> LazyExpression:
    """An expression with the shape, strides and dtype of a meta tensor; without gradients it has no graph at all."""
    if not (torch.is_grad_enabled() and layout.dtype.is_floating_point):
        node = map_inputs(node, lambda x: x.with_tensors(Tensor.detach))
    lazy: Any = Recorded.apply(node, layout, device, *leaves_of(node))
    lazy.parent, lazy.dense_values, lazy.copied_values = None, None, None
    lazy.differentiable, lazy.parent = requires_grad_of(lazy), parent
    lazy.node, lazy.front, lazy.reads = node, front, set() if reads is None else reads
    products = [x for x in inputs_of(node) if isinstance(x, Product)]
    lazy.state, lazy.hooks = products[0].state, _hooks(products)
    return lazy


def _hooks(products: list[Product]) -> list[Hook]:
    """The hooks of training wrappers on all logits, each once."""
    return list(dict.fromkeys(hook for product in products for hook in product.hooks))


def dense_value(node: Node, shape: torch.Size) -> Tensor:
    """The values of a node by plain torch operations."""
    given: dict[int, Tensor] = {}
    groups, rows, shared = grouped(inputs_of(node))
    for group in groups:
        z = group[0].raw.logits(group[0].hidden.reshape(-1, group[0].hidden.shape[-1]))
        given |= {id(x): z for x in group}
    given |= {id(x): _flat(x.tensor) for x in rows} | {id(x): x.tensor for x in shared}
    return evaluate(node, given).reshape(shape)


def streamed(node: Node, finish: Callable[[Tensor], Tensor], *, total: bool) -> Tensor:
    """`finish` of the values [n, V] of some rows, for all rows; with `total` the sum of what it returns.

    Raises:
        RuntimeError: An input was changed in place since.
    """
    inputs = inputs_of(node)
    for x in inputs:
        x.check()
    groups, rows, shared = grouped(inputs)
    states = states_of(inputs)
    for state in states:
        state.streamed += 1

    def function(products: list[Tensor], some: list[Tensor], same: list[Tensor]) -> Tensor:
        given = {id(x): z for group, z in zip(groups, products, strict=True) for x in group}
        pairs: list[tuple[Input, Tensor]] = [*zip(rows, some, strict=True), *zip(shared, same, strict=True)]
        return finish(evaluate(node, given | {id(x): tensor for x, tensor in pairs}))

    budgets = [state.request.memory_budget for state in states]
    request = Request(memory_budget=next((b for b in budgets if b is not None), None))
    pairs = [(_flat(group[0].hidden), group[0].raw) for group in groups]
    found = stream_rows(
        function, pairs, [_flat(x.tensor) for x in rows], [x.tensor for x in shared], request, total=total
    )
    return hooked(_hooks([x for group in groups for x in group]), found)


def states_of(inputs: list[Input]) -> list[PatchState]:
    """The states of the models whose logits are among the inputs, each once."""
    return [*{id(x.state): x.state for x in inputs if isinstance(x, Product)}.values()]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])

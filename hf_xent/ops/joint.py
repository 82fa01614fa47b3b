"""Functions of the rows of several heads' logits at once, and of other tensors with such rows, chunk by chunk.

    f(z_1[t], ..., z_k[t], rows[t], shared)          z_i = hidden_i W_i^T + b_i,   t = 1 .. N

One chunk of all products is in memory; strip by strip, in the cache, autograd turns them into their gradients, in
place. A sum over all rows has its gradients ready when the forward ends: three matmuls for a head that trains, one for
another. Rows themselves, whose upstream gradients come later, are computed again in the backward. Every tensor that
requires a gradient gets it: hidden states and heads of any of the models, `rows` and `shared`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import chunked, higher
from .autograd import scaled
from .buffers import Buffers, Gradients
from .functional import recomputed
from .head import Payload
from .problem import TENSORS, TILE, Problem, pieces
from .request import Request
from .rows import autocast_for, autocast_head, check_head
from .statistics import wide
from .tiles import strips

PARTS = 8  # strips are so many times smaller than others, since a function and autograd keep several tensors like one
_WIDTH = len(TENSORS) - 3  # tensors of a problem without payload

RowFunction = Callable[[list[Tensor], list[Tensor], list[Tensor]], Tensor]
"""(raw products [n, V] of each head, `rows` [n, ...], `shared`) -> [n, ...], row by row."""


def stream_rows(
    function: RowFunction,
    products: Sequence[Payload],  # hidden [N, D] and head of each model
    rows: Sequence[Tensor],  # [N, ...] each
    shared: Sequence[Tensor],
    request: Request,
    *,
    total: bool,
) -> Tensor:
    """What a function returns for all rows [N, ...], or with `total` the sum of all that, in the dtype of statistics.

    Args:
        function: Called with some rows of all products, without the heads' scale and softcap.
        products: Hidden states and whole heads of one vocabulary, with no scale, no softcap and no shard.
        rows: Tensors of which the function gets the same rows.
        shared: Tensors that it gets as they are.
        request: `memory_budget` is read.
        total: Whether to return the sum.
    """
    for hidden, head in products:
        check_head(hidden, head)
    problems = [_problem(*product) for product in products]
    job = _Job(function, tuple(problems), len(rows), total, _chunks(problems, request))
    tensors = (*(t for p in problems for t in p.tensors[:_WIDTH]), *rows, *shared)
    with torch.autocast(problems[0].hidden.device.type, enabled=False):
        if higher.under_function_transform(*tensors):
            return job.mapped(tensors)
        return _Joint.apply(replace(job, problems=tuple(p.without_tensors() for p in problems)), *tensors)


def _problem(hidden: Tensor, head: Any) -> Problem:
    """The operands of one model in the dtype of their product; the labels only count the rows."""
    head = autocast_head(head, hidden)
    hidden = autocast_for(head, hidden).contiguous()
    named = {"hidden": hidden, **head.tensors}
    needs = {name for name, x in named.items() if x is not None and x.requires_grad and torch.is_grad_enabled()}
    return Problem(hidden, head, _counting(hidden), frozenset(), needs=frozenset(needs))


def _counting(hidden: Tensor) -> Tensor:
    """Labels without values, as many as there are rows."""
    return torch.empty(len(hidden), dtype=torch.int64, device="meta")


def _chunks(problems: list[Problem], request: Request) -> list[slice]:
    """Row chunks in which the products of all models fit the memory budget."""
    count, device = len(problems[0].labels), problems[0].hidden.device
    itemsize = sum(p.hidden.element_size() for p in problems)
    budget = max(request.budget(p.head, count, itemsize) for p in problems)
    most = max(1, budget // (problems[0].head.size * itemsize))
    found = pieces(count, most, 0 if device.type == "cpu" else TILE)
    limit = min(chunked.most_chunks(p) for p in problems)  # sums of a weight gradient in its own dtype
    return pieces(count, math.ceil(count / limit)) if len(found) > limit else found


@dataclass(frozen=True)
class _Job:
    """What is computed, without the tensors that it is computed from."""

    function: RowFunction
    problems: tuple[Problem, ...]
    rows: int  # how many of the tensors after those of the problems have one row per token
    total: bool
    chunks: list[slice]

    def of(self, tensors: Sequence[Any], needs: Sequence[bool]) -> tuple[list[Problem], list[Any], list[Any]]:
        """The problems, and what follows them: rows and shared, from all tensors and which of them need a gradient."""
        problems = []
        for i, problem in enumerate(self.problems):
            part = slice(i * _WIDTH, (i + 1) * _WIDTH)
            named = frozenset(name for name, need in zip(TENSORS, needs[part], strict=False) if need)
            found = problem.with_tensors((*tensors[part], None, None, None), _counting(tensors[part][0]))
            problems.append(replace(found, needs=named))
        rest = list(tensors[len(problems) * _WIDTH :])
        return problems, rest[: self.rows], rest[self.rows :]

    def mapped(self, tensors: Sequence[Any]) -> Tensor:
        """The result from plain torch operations, for a graph of any order; rows are computed again in the backward."""
        cut = [i % _WIDTH == 0 if i < len(self.problems) * _WIDTH else i < len(self.problems) * _WIDTH + self.rows
               for i in range(len(tensors))]  # fmt: skip

        def part(*given: Any) -> Tensor:
            problems, rows, shared = self.of(given, [False] * len(given))
            return self.function([p.head.logits(p.hidden) for p in problems], rows, shared)

        run = recomputed(part, *tensors)
        found = []
        for chunk in self.chunks or [slice(0, 0)]:
            found.append(run(*(x[chunk] if c and x is not None else x for x, c in zip(tensors, cut, strict=True))))
        return torch.cat(found).sum() if self.total else torch.cat(found)


class _Joint(torch.autograd.Function):
    """Rows, or their sum, whose gradients are then ready when the forward ends."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor | None) -> Tensor:
        needs = ctx.needs_input_grad[1:]
        ready = job.total and any(needs)
        values, grads = _visit(job, tensors, needs if ready else [False] * len(tensors), None)
        ctx.job, ctx.count = job, len(tensors)
        ctx.save_for_backward(*tensors, *(grads if ready else ()))
        return values.sum() if job.total else values

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # read once: checkpoints allow no more
        tensors, ready = saved[: ctx.count], saved[ctx.count :]
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or higher.under_function_transform(upstream):
            with torch.enable_grad():  # a view leaves out what reaches a tensor through another (tied embeddings)
                views = [x.view_as(x) if need else x for x, need in zip(tensors, needs, strict=True)]
                value = ctx.job.mapped(views)
            wanted = [x for x, need in zip(views, needs, strict=True) if need]
            found = iter(torch.autograd.grad(value, wanted, upstream, create_graph=True, allow_unused=True))
            return None, *(next(found) if need else None for need in needs)
        if ready:
            return None, *scaled(list(ready), upstream, empty=not ctx.job.chunks)
        return None, *_visit(ctx.job, tensors, needs, upstream)[1]


def _visit(
    job: _Job, tensors: Sequence[Any], needs: Sequence[bool], upstream: Tensor | None
) -> tuple[Tensor, list[Tensor | None]]:
    """The function's values of all rows, and the gradients of their sum, weighted by `upstream`, where needed."""
    problems, rows, shared = job.of(tensors, needs)
    first, columns = len(problems) * _WIDTH, slice(0, problems[0].head.size)
    buffers = [Buffers(p, job.chunks) for p in problems]
    out = [Gradients(p, job.chunks, [columns]) for p in problems]
    grads: list[Tensor | None] = [
        torch.zeros_like(x, dtype=wide(x.dtype)) if need else None
        for x, need in zip([*rows, *shared], needs[first:], strict=True)
    ]
    values: Tensor | None = None
    for chunk in job.chunks:
        products = [b.load(chunk)[0] for b in buffers]
        for span, leaves, found in _strips(job, problems, products, ([r[chunk] for r in rows], shared), needs):
            if values is None:
                values = found.new_empty(len(problems[0].labels), *found.shape[1:])
            values[chunk][span] = found.detach()
            _differentiate_(found, leaves, None if upstream is None else upstream[chunk][span])
            _store_(products, grads, job.rows, leaves, chunk, span)
        for problem, gradients, dz in zip(problems, out, products, strict=True):
            if problem.needs:
                gradients.push(chunk, columns, dz)
    if values is None:  # there are no rows
        empty = [p.hidden.new_empty(0, p.head.size, dtype=wide(p.hidden.dtype)) for p in problems]
        values = job.function(empty, rows, shared).detach()
    named = [gradients.finish() for gradients in out]
    of_heads = [found.get(name) for found in named for name in TENSORS[:_WIDTH]]
    of_others = [None if g is None else g.to(x.dtype) for g, x in zip(grads, [*rows, *shared], strict=True)]
    return values, [*of_heads, *of_others]


@dataclass
class _Leaves:
    """What the function was given for one strip: those that need a gradient have it in `.grad` afterwards."""

    products: list[Tensor]
    others: list[Tensor]


def _strips(
    job: _Job,
    problems: list[Problem],
    products: list[Tensor],
    others: tuple[list[Tensor], list[Tensor]],
    needs: Sequence[bool],
) -> Iterator[tuple[slice, _Leaves, Tensor]]:
    """Strip by strip of a chunk: its rows, the leaves of the graph, and what the function returns."""
    rows, shared = others
    train = needs[len(problems) * _WIDTH :]
    for group in zip(*(strips(z, PARTS) for z in products), strict=True):
        span = group[0][0]
        leaves = _Leaves(
            [strip.detach().requires_grad_(bool(p.needs)) for (_, strip), p in zip(group, problems, strict=True)],
            [
                x.detach().requires_grad_(need)
                for x, need in zip([*(r[span] for r in rows), *shared], train, strict=True)
            ],
        )
        with torch.set_grad_enabled(any(needs)):
            found = job.function(leaves.products, leaves.others[: job.rows], leaves.others[job.rows :])
        yield span, leaves, found


def _differentiate_(found: Tensor, leaves: _Leaves, upstream: Tensor | None) -> None:
    """Set `.grad` of the leaves; None where the result does not depend on them."""
    wanted = [x for x in (*leaves.products, *leaves.others) if x.requires_grad]
    if not wanted or not found.requires_grad:
        return
    given = torch.ones_like(found) if upstream is None else upstream
    for leaf, grad in zip(wanted, torch.autograd.grad(found, wanted, given, allow_unused=True), strict=True):
        leaf.grad = grad


def _store_(
    products: list[Tensor], grads: list[Tensor | None], rows: int, leaves: _Leaves, chunk: slice, span: slice
) -> None:
    """The gradients of one strip: products are overwritten, those of other tensors are added up."""
    for product, leaf in zip(products, leaves.products, strict=True):
        if leaf.requires_grad:
            product[span] = 0 if leaf.grad is None else leaf.grad
    for i, (total, leaf) in enumerate(zip(grads, leaves.others, strict=True)):
        if total is not None and leaf.grad is not None:
            (total[chunk][span] if i < rows else total).add_(leaf.grad)

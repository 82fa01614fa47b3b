"""Functions of whole rows of two models' logits, with their gradients, in one visit: four matmuls in all.

They are for what is not a moment of either softmax, such as Jensen-Shannon divergence and total variation. A chunk of
both models' products is in memory; strip by strip, in the cache, autograd turns those of the first model into their
gradient, in place. The second model has none. For any other use there is `map_logits`, which computes the rows twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import chunked, higher
from .autograd import output_names, scaled
from .buffers import Buffers, Gradients
from .dispatch import payload_of, problem_of, stream_stats, unit_of
from .functional import map_logits
from .head import Head, Payload
from .problem import TENSORS, Problem, pieces
from .request import Request
from .rows import Rows
from .statistics import Stats, wide
from .tiles import concatenate, fold, strips

PARTS = 8  # strips are so many times smaller than others, since autograd keeps about ten tensors like one

RowFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits [n, V], the second model's [n, V]) -> [n], all in the dtype of statistics."""


def stream_pairs(
    function: RowFunction,
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    second: Payload,
    request: Request,
    token_weight: Tensor | float = 1.0,
) -> tuple[Tensor, Stats]:
    """The sum of `token_weight * function(logits, second logits)` over the valid tokens, and detached statistics.

    Args:
        function: A differentiable function of whole rows.
        hidden: Hidden states [..., D].
        head: The head that turns them into logits.
        labels: Token ids [...], which select the positions that count.
        second: Hidden states [..., D2] and head of the second model; constants.
        request: The options of the call; `unreduced` asks for the weighted losses in the shape of labels.
        token_weight: Constant weights [...], or one number.

    Returns:
        The sum, and the statistics that `request.observe` names beside `lse`, `target` and `loss`.
    """
    outputs = ("lse", "target", *request.observe)
    rows = Rows(hidden, head, labels, request.ignore_index)
    problem = problem_of(rows, outputs, None, request, chunked)
    problem = replace(problem, payload=payload_of(rows, (second[0].detach(), second[1].detach())))
    weight = rows.select(torch.as_tensor(token_weight, device=labels.device).expand(labels.shape))
    if head.shard is None and not request.unreduced and not higher.under_function_transform(*problem.tensors):
        unit = unit_of(weight, problem.hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            total, losses, *values = _PairSum.apply(function, problem, weight / unit, unit, *problem.tensors)
        return total, rows.scatter({**dict(zip(output_names(problem), values, strict=True)), "loss": losses})
    with torch.autocast(hidden.device.type, enabled=False):
        losses = _mapped(function, problem)
    total = rows.scatter({"loss": losses * weight}).loss if request.unreduced else (losses * weight).sum()
    with torch.no_grad():
        stats = stream_stats(hidden, head, labels, outputs, request)
    stats.values |= rows.scatter({"loss": losses.detach()}).values
    return total, stats


def _mapped(function: RowFunction, problem: Problem) -> Tensor:
    """The losses [N] with a graph, by rows that are computed again in the backward."""
    assert problem.payload is not None
    second, head = problem.payload
    budget = problem.memory_budget
    return map_logits(
        lambda z, h: function(z, head.logits(h)), problem.hidden, problem.head, second, memory_budget=budget
    )


class _PairSum(torch.autograd.Function):
    """The sum, each token's loss and the statistics; gradients are ready when the forward ends."""

    @staticmethod
    def forward(
        ctx: Any, function: RowFunction, problem: Problem, weight: Tensor, unit: Any, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        values, losses, grads = _visit(function, problem, weight)
        ctx.function, ctx.problem, ctx.unit = function, problem.without_tensors(), unit
        ctx.save_for_backward(*(grads.get(name) for name in TENSORS), *tensors, problem.labels, weight)
        others = [values[name] for name in output_names(problem)]
        ctx.mark_non_differentiable(losses, *others)
        return (losses * weight).sum() * unit, losses, *others

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
        *saved, labels, weight = ctx.saved_tensors
        grads, tensors = saved[: len(TENSORS)], saved[len(TENSORS) :]
        upstream = upstream * ctx.unit
        if torch.is_grad_enabled() or higher.under_function_transform(upstream):
            problem = ctx.problem.with_tensors(tuple(tensors), labels)
            leaves = {name: tensors[TENSORS.index(name)] for name in problem.needs}
            total = (_mapped(ctx.function, problem) * weight).sum()
            again = torch.autograd.grad(total, list(leaves.values()), upstream, create_graph=True)
            found = dict(zip(leaves, again, strict=True))
            return None, None, None, None, *(found.get(name) for name in TENSORS)
        return None, None, None, None, *scaled(grads, upstream, empty=not len(labels))


def _visit(
    function: RowFunction, problem: Problem, weight: Tensor
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Statistics, losses [N] and the weighted sum's gradients."""
    chunks, columns, alone = _chunks(problem), slice(0, problem.head.size), replace(problem, payload=None)
    buffers, out = Buffers(problem, chunks), Gradients(problem, chunks, [columns])
    parts, losses = [], problem.hidden.new_empty(len(weight), dtype=wide(problem.hidden.dtype))
    for rows in chunks:
        products, second = buffers.load(rows)
        assert second is not None
        parts.append(fold(alone, rows, (products, None), keep=True))
        _differentiate_(function, problem, products, second, weight[rows], losses[rows])
        if problem.needs:
            out.push(rows, columns, products)
    return concatenate(parts, problem), losses, out.finish()


def _chunks(problem: Problem) -> list[slice]:
    """Row chunks within the memory budget, but no more than a low-precision weight gradient may be summed over."""
    chunks, most = problem.rows(), chunked.most_chunks(problem.hidden)
    return pieces(len(problem.labels), math.ceil(len(problem.labels) / most)) if len(chunks) > most else chunks


def _differentiate_(
    function: RowFunction, problem: Problem, products: Tensor, second: Tensor, weight: Tensor, losses: Tensor
) -> None:
    """Write the losses [n] of a chunk; the products of the first head become the weighted sum's gradient."""
    assert problem.payload is not None
    trains = bool(problem.needs)
    for (span, strip), (_, other) in zip(strips(products, PARTS), strips(second, PARTS), strict=True):
        with torch.set_grad_enabled(trains):
            raw = strip.detach().requires_grad_(trains)
            part = function(problem.head.activate(raw), problem.payload[1].activate(other))
            if trains:
                products[span] = torch.autograd.grad((part * weight[span]).sum(), raw)[0]
        losses[span] = part.detach()

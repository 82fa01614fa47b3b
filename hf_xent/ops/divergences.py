"""Divergences of whole rows of logits, of passes of a model or of two models, with their gradients in one visit.

They are for what is not a moment of one softmax, such as Jensen-Shannon divergence, or what would take several visits,
such as the divergences of three passes. A chunk of all products is in memory; strip by strip, in the cache, autograd
turns those of the passes into their gradient, in place: three matmuls a pass, and one for a second model, which has no
gradient. All passes have one gradient of the head. For any other use rows are computed twice, by `map_rows`. A head
that is split over ranks is no exception: `split_rows` has the sums over its parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from . import chunked, closed_form, higher, split_rows
from .alike import split_alike
from .autograd import scaled
from .buffers import Buffers, Gradients
from .dispatch import payload_of, problem_of, stream_stats, unit_of
from .entries import EntryLoss
from .functional import map_rows, rows_in
from .head import Head, Payload
from .problem import TENSORS, Problem
from .ranks import merge_ranks, reduce_from_ranks
from .request import Request
from .row_loss import RowLoss
from .rows import Rows, autocast_for
from .shard import copy_to_ranks
from .statistics import Stats, wide
from .tiles import concatenate, fold, strips

PARTS = 8  # strips are so many times smaller than others, since autograd keeps about ten tensors like one


def stream_divergence(
    function: RowLoss | EntryLoss,
    passes: Sequence[Tensor],
    head: Head,
    labels: Tensor,
    request: Request,
    token_weight: Tensor | float = 1.0,
    second: Payload | None = None,
) -> tuple[Tensor, Stats]:
    """The sum of `token_weight * function(...)["loss"]` over the valid tokens, and detached statistics.

    Args:
        function: The loss of whole rows, or of some entries of them and all others together, of a single pass.
        passes: Hidden states [..., D] of each pass.
        head: The head that turns them into logits.
        labels: Token ids [...], which select the positions that count.
        request: The options of the call; `unreduced` asks for the weighted losses in the shape of labels.
        token_weight: Constant weights [...], or one number.
        second: Hidden states [..., D2] and head of a second model, beside a single pass; constants. If one of the two
            heads is split over ranks, the other may be, too, or be whole.

    Returns:
        The sum, and the statistics of the first pass that `request.observe` names, with `lse`, `target`, and what the
        function returned.
    """
    assert len(passes) == 1 or (second is None and isinstance(function, RowLoss))  # one buffer has all passes
    head, second = split_alike(head, second)
    outputs = ("lse", "target", *request.observe)
    rows = Rows(passes[0], head, labels, request.ignore_index)
    problem = problem_of(rows, outputs, None, request, chunked)
    weight = rows.select(torch.as_tensor(token_weight, device=labels.device).expand(labels.shape))
    function = function.of_valid(rows)
    if second is not None:
        second = payload_of(rows, (second[0].detach(), second[1].detach()))
    hidden = [problem.hidden, *(autocast_for(head, rows.select(h, trailing=1)) for h in passes[1:])]
    stacked = torch.stack(hidden, 1) if hidden[1:] else problem.hidden[:, None]
    needs = problem.needs | ({"hidden"} if stacked.requires_grad and torch.is_grad_enabled() else set())
    problem = replace(problem, hidden=stacked, payload=second, needs=needs)
    if not request.unreduced and not higher.under_function_transform(*problem.tensors):
        unit, values = unit_of(weight, problem.hidden.dtype), dict[str, Tensor]()
        with torch.autocast(labels.device.type, enabled=False):
            total = _Sum.apply(function, problem, weight / unit, unit, values, *problem.tensors)
        return total, rows.scatter(values)
    with torch.autocast(labels.device.type, enabled=False):
        values = _mapped(function, problem)
    weighted = values["loss"] * weight
    total = rows.scatter({"loss": weighted}).loss if request.unreduced else weighted.sum()
    with torch.no_grad():
        stats = stream_stats(passes[0], head, labels, outputs, request)
    stats.values |= rows.scatter({name: value.detach() for name, value in values.items()}).values
    return total, stats


def _mapped(function: RowLoss | EntryLoss, problem: Problem) -> dict[str, Tensor]:
    """What the function returns for all tokens, with a graph, by rows that are computed again in the backward."""
    if isinstance(function, EntryLoss):
        return function.mapped(problem)
    names: list[str] = []
    head, shard, second = problem.head, problem.head.shard, problem.payload

    def values(logits: Tensor, labels: Tensor, *others: Tensor) -> Tensor:
        rows, first = [*logits.unbind(1)], len(others) - len(function.rows)
        rows += [replace(second[1], shard=None).logits(hidden) for hidden in others[:first] if second is not None]
        loss = function.with_rows(others[first:])
        found = loss(labels, *rows) if shard is None else split_rows.sums_over_ranks(loss, labels, rows, shard)
        names[:] = found
        return torch.stack([*found.values()], 1)

    budget = problem.memory_budget // problem.hidden.shape[1]
    step = rows_in(budget, head.size if shard is None else shard.width, problem.hidden.dtype)
    rows = (problem.label_columns, *(() if second is None else second[:1]), *function.rows)
    found = map_rows(values, copy_to_ranks(problem.hidden, shard), replace(head, shard=None), rows, step)
    return dict(zip(names, found.unbind(1), strict=True))


class _Sum(torch.autograd.Function):
    """The weighted sum; its gradients are ready when the forward ends. The other values have no graph."""

    @staticmethod
    def forward(
        ctx: Any,
        function: RowLoss | EntryLoss,
        problem: Problem,
        weight: Tensor,
        unit: Any,
        values: dict[str, Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        found, grads = _visit(function, problem, weight)
        values |= found
        ctx.function, ctx.problem, ctx.unit = function, problem.without_tensors(), unit
        ctx.save_for_backward(*(grads.get(name) for name in TENSORS), *tensors, problem.labels, weight)
        return (values["loss"] * weight).sum() * unit

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        *saved, labels, weight = ctx.saved_tensors
        grads, tensors = saved[: len(TENSORS)], saved[len(TENSORS) :]
        upstream = upstream * ctx.unit
        if torch.is_grad_enabled() or higher.under_function_transform(upstream):
            problem = ctx.problem.with_tensors(tuple(tensors), labels)
            leaves = {name: tensors[TENSORS.index(name)] for name in problem.needs}
            total = (_mapped(ctx.function, problem)["loss"] * weight).sum()
            again = torch.autograd.grad(total, list(leaves.values()), upstream, create_graph=True)
            found = dict(zip(leaves, again, strict=True))
            return None, None, None, None, None, *(found.get(name) for name in TENSORS)
        return None, None, None, None, None, *scaled(grads, upstream, empty=not len(labels))


def _visit(
    function: RowLoss | EntryLoss, problem: Problem, weight: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Statistics and what the function returns, [N] each, and the weighted sum's gradients."""
    if isinstance(function, EntryLoss):
        return function.visit(problem, weight)
    count, passes, _ = problem.hidden.shape
    flat = replace(problem, hidden=problem.hidden.flatten(0, 1), labels=problem.labels.repeat_interleave(passes))
    chunks = chunked.chunks_of(flat, count)
    rows, columns = [slice(passes * part.start, passes * part.stop) for part in chunks], slice(0, problem.head.size)
    buffers, out = Buffers(flat, rows), Gradients(flat, rows, [columns])
    alone = replace(problem, payload=None, hidden=problem.hidden[:, 0])  # the first pass
    known = bool(chunks) and _formula(function, problem) is not None and alone.outputs <= function.knows
    statistics, values = [], dict[str, Tensor]()
    for tokens, span in zip(chunks, rows, strict=True):
        products, second = buffers.load(span)
        by_token = products.unflatten(0, (-1, passes))
        if not known:
            local = fold(alone, tokens, (by_token[:, 0], None), keep=True)
            statistics.append(merge_ranks(alone, local, tokens))
        for strip, found in _differentiate_(function[tokens], problem, tokens, (by_token, second), weight[tokens]):
            for name, value in found.items():  # into one tensor: small ones would keep what strips need apart
                whole = values.setdefault(name, value.new_empty(count))
                whole[tokens][strip] = value
        if problem.needs:
            out.push(span, columns, products)
    if not chunks:
        empty = problem.hidden.new_empty(0, problem.head.size, dtype=wide(problem.hidden.dtype))
        values = function(problem.labels, *[empty] * (passes + (problem.payload is not None)))
    grads = reduce_from_ranks(problem, out.finish())
    if "hidden" in grads:
        grads["hidden"] = grads["hidden"].view_as(problem.hidden)
    return concatenate(statistics, problem) | values, grads


def _differentiate_(
    function: RowLoss, problem: Problem, tokens: slice, products: tuple[Tensor, Tensor | None], weight: Tensor
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """What the function returns, strip by strip of a chunk; products of the passes [n, k, V] become the gradient."""
    if problem.head.shard is not None:
        yield slice(None), split_rows.differentiate_(function, problem, tokens, products, weight, PARTS)
        return
    passes, second = products
    if (closed := _formula(function, problem)) is not None and second is not None:
        pair = passes[:, 0], second
        yield from closed_form.differentiate_(closed, problem, problem.labels[tokens], pair, weight)
        return
    trains, labels = bool(problem.needs), problem.labels[tokens]
    others = repeat(None) if second is None else (strip for _, strip in strips(second, PARTS))
    for (span, strip), other in zip(strips(passes, PARTS), others, strict=False):
        with torch.set_grad_enabled(trains):
            raw = strip.detach().requires_grad_(trains)
            logits = [*problem.head.activate(raw).unbind(1)]
            if other is not None and problem.payload is not None:
                logits.append(problem.payload[1].activate(other))
            values = function[span](labels[span], *logits)
            if trains:
                passes[span] = torch.autograd.grad((values["loss"] * weight[span]).sum(), raw)[0]
        yield span, {name: value.detach() for name, value in values.items()}


def _formula(function: RowLoss, problem: Problem) -> closed_form.Closed | None:
    """The gradient as a formula, if there is one; the ranks of a split head differentiate their sums apart."""
    return function.closed if problem.payload is not None and problem.head.shard is None else None

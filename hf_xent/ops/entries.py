"""Losses of k given entries of every row of logits and of the sum over all others, in one visit of the vocabulary.

With O the columns of a row that are not given, a loss is a function of the given logits, of the label's, and of

    lse_T = log sum_{j in O} e^(z_j / T)

Its derivatives by these, few numbers per token, give the gradient of the whole row, in place of the products:

    dz_j = sum_T a_T / T e^(z_j / T - lse_T)          a_T by lse_T

for the columns of O, and the derivative by its logit for each that is given. The mass of O is summed over its columns:
as 1 minus that of the given ones, it would have no digits left where a model is sure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor
from torch import distributed as dist

from . import chunked
from .buffers import Buffers, Gradients
from .closed_form import softmax_
from .functional import map_rows, rows_in
from .head import Head
from .problem import Problem
from .ranks import merge_ranks, reduce_from_ranks
from .row_loss import Constants, at_ids, at_labels, with_entries
from .shard import Shard, copy_to_ranks, sum_ranks
from .statistics import wide
from .tiles import concatenate, fold, strips

PARTS = 2  # strips are so many times smaller than others: two tensors like one are in use together


@dataclass(frozen=True)
class Entries:
    """What a loss may know of n rows of logits."""

    label: Tensor  # [n], the label's logit
    given: Tensor  # [n, k], the logits of the token's ids
    others: dict[float, Tensor]  # by T: log sum exp of z / T over all other columns, [n]

    def lse(self, temperature: float = 1.0) -> Tensor:
        """log sum exp of whole rows of z / T, [n]."""
        return torch.logaddexp((self.given / temperature).logsumexp(-1), self.others[temperature])


@dataclass(frozen=True)
class EntryLoss(Constants):
    """A loss of given entries of every row and of all others together, for `divergences.stream_divergence`.

    Args:
        of: (entries of n tokens, rows [n, ...] of each tensor in `rows` but the first) -> 'loss' [n], and whatever else
            is to be recorded, [n] each, by name; the loss is differentiable any number of times.
        softmaxes: The temperatures of the sums over other columns that the loss is differentiated by.
        rows: Distinct ids of the given columns, [..., k] in the shape of labels, and further constants of every token.
        constant: Temperatures of further sums, which carry no gradient; that at 1 is always there.
    """

    of: Callable[..., dict[str, Tensor]]
    softmaxes: tuple[float, ...]
    rows: tuple[Tensor, ...]
    constant: tuple[float, ...] = ()

    @property
    def temperatures(self) -> list[float]:
        """All temperatures; 1, for which no logits are divided, is the last."""
        return [t for t in dict.fromkeys((*self.softmaxes, *self.constant)) if t != 1] + [1.0]

    def at(self, entries: Entries) -> dict[str, Tensor]:
        """The values of `of` for the tokens that `rows` are of."""
        return self.of(entries, *self.rows[1:])

    def mapped(self, problem: Problem) -> dict[str, Tensor]:
        """The values for all tokens, with a graph, by rows that are computed again in the backward."""
        names: list[str] = []
        head, shard = problem.head, problem.head.shard

        def values(logits: Tensor, labels: Tensor, *rows: Tensor) -> Tensor:
            loss = self.with_rows(rows)
            found = loss.at(_whole(_local(loss, logits[:, 0], labels, shard), shard))
            names[:] = found
            return torch.stack([*found.values()], 1)

        step = rows_in(problem.memory_budget, head.size if shard is None else shard.width, problem.hidden.dtype)
        rows = (problem.label_columns, *self.rows)
        found = map_rows(values, copy_to_ranks(problem.hidden, shard), replace(head, shard=None), rows, step)
        return dict(zip(names, found.unbind(1), strict=True))

    def visit(self, problem: Problem, weight: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Statistics and values of `of`, [N] each, and the gradients of the weighted sum of its loss."""
        shape = problem.hidden.shape
        problem = replace(problem, hidden=problem.hidden.flatten(0, 1))  # a single pass
        chunks, columns = chunked.chunks_of(problem, shape[0]), slice(0, problem.head.size)
        buffers, out = Buffers(problem, chunks), Gradients(problem, chunks, [columns])
        parts = []
        for tokens in chunks:
            products, _ = buffers.load(tokens)
            parts.append(_differentiate_(self[tokens], problem, tokens, products, weight[tokens]))
            if problem.needs:
                out.push(tokens, columns, products)
        grads = reduce_from_ranks(problem, out.finish())
        if "hidden" in grads:
            grads["hidden"] = grads["hidden"].view(shape)
        if not chunks:
            empty = problem.hidden.new_empty(0, problem.head.size, dtype=wide(problem.hidden.dtype))
            return concatenate([], problem) | self.at(_local(self, empty, problem.labels, problem.head.shard)), grads
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, grads


def _local(loss: EntryLoss, z: Tensor, labels: Tensor, shard: Shard | None) -> Entries:
    """The entries of rows of logits [n, V] with a graph, of this rank's columns where the vocabulary is split."""
    others, found = with_entries(z, loss.rows[0], -torch.inf, split=shard is not None), {}
    for temperature in loss.temperatures:
        u = others if temperature == 1 else others / temperature
        largest = u.detach().amax(-1)
        nothing = largest == -torch.inf
        largest = torch.where(nothing, 0.0, largest)
        total = (u - largest[:, None]).exp().sum(-1).clamp(min=torch.finfo(z.dtype).tiny)
        found[temperature] = torch.where(nothing, -torch.inf, largest + total.log())
    return Entries(at_labels(z, labels), at_ids(z, loss.rows[0]), found)


def _whole(part: Entries, shard: Shard | None) -> Entries:
    """The entries of whole rows, with a graph; where there is no other column, its logit is far below all."""
    if shard is not None:
        summed = sum_ranks(torch.cat([part.label[:, None], part.given], 1), shard)
        lse = torch.stack([*part.others.values()])
        largest = lse.detach().clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=shard.group)
        shift = torch.where(largest == -torch.inf, 0.0, largest)
        total = sum_ranks((lse - shift).exp().clone(), shard).clamp(min=torch.finfo(lse.dtype).tiny)
        lse = torch.where(largest == -torch.inf, largest, shift + total.log())
        part = Entries(summed[:, 0], summed[:, 1:], dict(zip(part.others, lse, strict=True)))
    tiny, top = math.log(torch.finfo(part.given.dtype).tiny), part.given.detach().amax(-1)
    return replace(part, others={t: torch.where(x == -torch.inf, top / t + tiny, x) for t, x in part.others.items()})


def _differentiate_(
    loss: EntryLoss, problem: Problem, tokens: slice, products: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    """Statistics and values of a chunk, [n] each; its products become the gradient of the weighted sum."""
    trains, head, labels = bool(problem.needs), problem.head, problem.label_columns[tokens]
    statistics = {}
    if problem.outputs - {"lse", "target"}:
        statistics = merge_ranks(problem, fold(problem, tokens, (products, None), keep=True), tokens)
    # a single softmax of wide logits replaces the products at once, and needs no second exponential
    single = trains and len(loss.softmaxes) == 1 and head.softcap is None and products.dtype == wide(products.dtype)
    kept = loss.softmaxes[0] if single else None
    with torch.no_grad():
        parts, totals = [], []
        for span, strip in strips(products, PARTS):
            part, total = _measure_(loss[span], head, (strip, products[span]), labels[span], kept)
            parts.append(part)
            totals.append(total)
        local = _concatenated(parts)
        found = _whole(local, head.shard)
    leaves = [x.detach().requires_grad_(trains) for x in (found.label, found.given)]
    leaves += [found.others[t].detach().requires_grad_(trains) for t in loss.softmaxes]
    with torch.set_grad_enabled(trains):
        others = found.others | dict(zip(loss.softmaxes, leaves[2:], strict=True))
        values = loss.at(Entries(leaves[0], leaves[1], others))
        if trains:
            grads = torch.autograd.grad((values["loss"] * weight).sum(), leaves, materialize_grads=True)
            slopes = Entries(grads[0], grads[1], dict(zip(loss.softmaxes, grads[2:], strict=True)))
            if kept is not None:  # of this rank's columns e / total, with e in place of the products
                slopes.others[kept] *= (local.others[kept] - found.others[kept]).exp() / torch.cat(totals)
            _write_(loss, problem, products, (labels, found, slopes), kept)
    statistics = statistics or {"lse": found.lse(), "target": found.label}
    return statistics | {name: value.detach() for name, value in values.items()}


def _measure_(
    loss: EntryLoss, head: Head, raw: tuple[Tensor, Tensor], labels: Tensor, kept: float | None
) -> tuple[Entries, Tensor]:
    """The entries of this rank's columns of a strip of products, and the sum of what replaces these: e of `kept`.

    `raw` has the products in the dtype of statistics, and as they are. The given ones are lost.
    """
    z, products = head.activate(raw[0]), raw[1]
    label, given, lowest = at_labels(z, labels), at_ids(z, loss.rows[0]), torch.finfo(z.dtype).min
    found, sums, stored = {}, z.new_ones(len(z)), products
    for temperature in loss.temperatures:
        u = z if temperature == 1 else z / temperature
        _set_(u, loss.rows[0], lowest, split=head.shard is not None)
        e = torch.empty_like(u) if u.data_ptr() == products.data_ptr() and kept != 1 else u
        lse, total = softmax_(u, e)
        nothing = lse == lowest  # so large that the logarithm of the number of columns is lost in it
        found[temperature] = torch.where(nothing, -torch.inf, lse)
        if temperature == kept:
            sums, stored = torch.where(nothing, torch.inf, total), e
    if stored.data_ptr() != products.data_ptr():
        products.copy_(stored)
    return Entries(label, given, found), sums


def _write_(
    loss: EntryLoss,
    problem: Problem,
    products: Tensor,
    found: tuple[Tensor, Entries, Entries],  # labels, entries of whole rows, the loss's derivatives by them
    kept: float | None,
) -> None:
    """Products -> their gradient, or, with `kept`, the exponentials of this temperature that are in their place."""
    head, (labels, entries, slopes) = problem.head, found
    given, label = slopes.given * head.slope(entries.given), slopes.label * head.slope(entries.label)
    for span, strip in strips(products, PARTS):
        if kept is not None:
            dz = strip.mul_(slopes.others[kept][span, None] * (head.scale / kept))
        else:
            z = head.activate(strip)
            dz = reduce(Tensor.add_, _of_others(z, entries, slopes, span)).mul_(head.slope(z))
        _set_(dz, loss.rows[0][span], given[span], split=head.shard is not None)
        own = (labels[span] >= 0) & (labels[span] < dz.shape[1])
        places = labels[span].clamp(0, dz.shape[1] - 1)[:, None]
        dz.scatter_add_(1, places, torch.where(own, label[span], 0.0)[:, None])
        if dz.data_ptr() != products[span].data_ptr():
            products[span] = dz


def _of_others(z: Tensor, entries: Entries, slopes: Entries, span: slice) -> Iterator[Tensor]:
    """The terms of the gradient of a strip of logits [n, V]; given entries hold anything."""
    for t, slope in slopes.others.items():
        u = z if t == 1 else z / t
        yield (u - entries.others[t][span, None]).exp_().mul_(slope[span, None] / t)


def _set_(x: Tensor, ids: Tensor, values: Tensor | float, *, split: bool) -> None:
    """Numbers [n, k], or one number, at the ids [n, k] of each row, of which a rank of a split vocabulary has some."""
    if not split:
        x.scatter_(1, ids, values)
        return
    rows, places = ((ids >= 0) & (ids < x.shape[1])).nonzero(as_tuple=True)
    x[rows, ids[rows, places]] = values[rows, places] if isinstance(values, Tensor) else values


def _concatenated(parts: list[Entries]) -> Entries:
    """The entries of all rows from those of their strips."""
    others = {t: torch.cat([part.others[t] for part in parts]) for t in parts[0].others}
    return Entries(torch.cat([part.label for part in parts]), torch.cat([part.given for part in parts]), others)

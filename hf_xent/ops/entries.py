"""Losses of k given entries of every row of logits and of sums over all others, in one visit of the vocabulary.

With O the columns of a row that are not given, a loss is a function of the given logits, of the label's, and of

    lse_T = log sum_{j in O} e^(z_j / T)     mean_T = sum_{j in O} e^(z_j / T - lse_T) z_j / T

Its derivatives by these, few numbers per token, give the gradient of the whole row, in place of the products:

    dz_j = sum_T e^(z_j / T - lse_T) (a_T + b_T (1 + z_j / T - mean_T)) / T         a by lse_T, b by mean_T

for the columns of O, and the derivative by its logit for each that is given. The mass of O is summed over its columns:
as 1 minus that of the given ones, it would have no digits left where a model is sure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch import distributed as dist

from . import chunked
from .buffers import Buffers, Gradients
from .functional import map_rows, rows_in
from .problem import Problem, pieces
from .ranks import merge_ranks, reduce_from_ranks
from .row_loss import Constants, at_ids, at_labels, with_entries
from .shard import Shard, copy_to_ranks, sum_ranks
from .statistics import wide
from .tiles import concatenate, fold, strips

Moment = tuple[str, float]  # 'lse' or 'mean', and the temperature
LSE = ("lse", 1.0)  # which the statistics of a token need, whatever the loss is of
PARTS = 4  # strips are so many times smaller than others, for the tensors like one that are in use together


@dataclass(frozen=True)
class Entries:
    """What a loss may know of n rows of logits."""

    label: Tensor  # [n], the label's logit
    given: Tensor  # [n, k], the logits of the token's ids
    moments: dict[Moment, Tensor]  # [n] each, of all other columns

    def lse(self, temperature: float = 1.0) -> Tensor:
        """log sum exp of whole rows of z / T, [n]."""
        return torch.logaddexp((self.given / temperature).logsumexp(-1), self.moments["lse", temperature])


@dataclass(frozen=True)
class EntryLoss(Constants):
    """A loss of given entries of every row and of all others together, for `divergences.stream_divergence`.

    Args:
        of: (entries of n tokens, rows [n, ...] of each tensor in `rows` but the first) -> 'loss' [n], and whatever else
            is to be recorded, [n] each, by name; the loss is differentiable any number of times.
        moments: The sums over other columns that `of` reads: 'lse' or 'mean', and a temperature. The 'lse' at 1 is
            always there, and that at the temperature of a mean.
        rows: Distinct ids of the given columns, [..., k] in the shape of labels, and further constants of every token.
    """

    of: Callable[..., dict[str, Tensor]]
    moments: tuple[Moment, ...] = ()
    rows: tuple[Tensor, ...] = ()

    @property
    def keys(self) -> tuple[Moment, ...]:
        """All moments that are computed."""
        return tuple(dict.fromkeys((LSE, *(("lse", t) for _, t in self.moments), *self.moments)))

    def at(self, entries: Entries) -> dict[str, Tensor]:
        """The values of `of` for the tokens that `rows` are of."""
        return self.of(entries, *self.rows[1:])

    def mapped(self, problem: Problem) -> dict[str, Tensor]:
        """The values for all tokens, with a graph, by rows that are computed again in the backward."""
        names: list[str] = []
        head, shard = problem.head, problem.head.shard

        def values(logits: Tensor, labels: Tensor, *rows: Tensor) -> Tensor:
            loss = self.with_rows(rows)
            found = loss.at(whole(local(loss, logits[:, 0], labels), shard))
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
        most, columns = min(len(problem.rows()), chunked.most_chunks(problem)), slice(0, problem.head.size)
        chunks = pieces(shape[0], math.ceil(shape[0] / most)) if shape[0] else []
        buffers, out = Buffers(problem, chunks), Gradients(problem, chunks, [columns])
        parts = []
        for tokens in chunks:
            products, _ = buffers.load(tokens)
            parts.append(_differentiate_(self[tokens], problem, tokens, products, weight[tokens]))
            if problem.needs:
                out.push(tokens, columns, products)
        if not chunks:
            empty = problem.hidden.new_empty(0, problem.head.size, dtype=wide(problem.hidden.dtype))
            entries = local(self, empty, problem.labels)
            return concatenate([], problem) | self.at(entries), out.finish()
        grads = reduce_from_ranks(problem, out.finish())
        if "hidden" in grads:
            grads["hidden"] = grads["hidden"].view(shape)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, grads


def local(loss: EntryLoss, z: Tensor, labels: Tensor) -> Entries:
    """The entries of rows of logits [n, V] with a graph, of this rank's columns where the vocabulary is split."""
    ids = loss.rows[0]
    others = with_entries(z, ids, -torch.inf)
    moments: dict[Moment, Tensor] = {}
    for temperature in dict.fromkeys(t for _, t in loss.keys):
        u = others if temperature == 1 else others / temperature
        largest = u.detach().amax(-1)
        nothing = largest == -torch.inf
        largest = torch.where(nothing, 0.0, largest)
        u = u - largest[:, None]
        e = u.exp()
        total = e.sum(-1).clamp(min=torch.finfo(z.dtype).tiny)
        moments["lse", temperature] = torch.where(nothing, -torch.inf, largest + total.log())
        if ("mean", temperature) in loss.keys:
            moments["mean", temperature] = largest + (e * u.clamp(min=-1e4)).sum(-1) / total
    return Entries(at_labels(z, labels), at_ids(z, ids), moments)


def whole(part: Entries, shard: Shard | None) -> Entries:
    """The entries of whole rows, with a graph; where there is no other column, its logit is far below all."""
    moments = part.moments
    if shard is not None:
        summed = sum_ranks(torch.cat([part.label[:, None], part.given], 1), shard)
        part = Entries(summed[:, 0], summed[:, 1:], {})
        moments = _of_ranks(moments, shard)
    lowest = {t: part.given.detach().amax(-1) / t + math.log(torch.finfo(part.given.dtype).tiny) for _, t in moments}
    bounded = {key: torch.where(x == -torch.inf, lowest[key[1]], x) for key, x in moments.items()}
    return replace(part, moments=bounded)


def _of_ranks(moments: dict[Moment, Tensor], shard: Shard) -> dict[Moment, Tensor]:
    """The moments of all ranks' columns together."""
    lse = {key: x for key, x in moments.items() if key[0] == "lse"}
    largest = torch.stack([*lse.values()]).detach()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=shard.group)
    shift = torch.where(largest == -torch.inf, 0.0, largest)
    shares = {key[1]: (x - m).exp() for (key, x), m in zip(lse.items(), shift, strict=True)}
    means = {key: shares[key[1]] * x for key, x in moments.items() if key[0] == "mean"}
    total = sum_ranks(torch.stack([*shares.values(), *means.values()]), shard)
    share = dict(zip(shares, total, strict=False))
    tiny = torch.finfo(total.dtype).tiny
    found = {
        key: torch.where(m == -torch.inf, m, m + share[key[1]].clamp(min=tiny).log())
        for key, m in zip(lse, largest, strict=True)
    }
    return found | {key: x / share[key[1]].clamp(min=tiny) for key, x in zip(means, total[len(shares) :], strict=True)}


def _differentiate_(
    loss: EntryLoss, problem: Problem, tokens: slice, products: Tensor, weight: Tensor
) -> dict[str, Tensor]:
    """Statistics and values of a chunk, [n] each; its products become the gradient of the weighted sum."""
    labels = problem.label_columns[tokens]
    observed = problem.outputs - {"lse", "target"}
    statistics = merge_ranks(problem, fold(problem, tokens, (products, None), keep=True), tokens) if observed else {}
    with torch.no_grad():
        parts = [
            local(loss[span], problem.head.activate(strip), labels[span]) for span, strip in strips(products, PARTS)
        ]
        found = whole(_concatenated(parts), problem.head.shard)
    trains = bool(problem.needs)
    leaves = [x.detach().requires_grad_(trains) for x in (found.label, found.given, *found.moments.values())]
    entries = Entries(leaves[0], leaves[1], dict(zip(found.moments, leaves[2:], strict=True)))
    with torch.set_grad_enabled(trains):
        values = loss.at(entries)
        if trains:
            total = (values["loss"] * weight).sum()
            slopes = torch.autograd.grad(total, leaves, allow_unused=True)
            by_moment = {key: g for key, g in zip(found.moments, slopes[2:], strict=True) if g is not None}
    if trains:
        for span, strip in strips(products, PARTS):
            z = problem.head.activate(strip)
            dz = _of_others(z, found.moments, by_moment, span)
            _set_entries_(dz, loss.rows[0][span], slopes[1], span, split=problem.head.shard is not None)
            _add_label_(dz, labels[span], slopes[0], span)
            products[span] = dz.mul_(problem.head.slope(z)) if problem.head.softcap else dz.mul_(problem.head.scale)
    statistics = statistics or {"lse": entries.lse().detach(), "target": found.label}
    return statistics | {name: value.detach() for name, value in values.items()}


def _concatenated(parts: list[Entries]) -> Entries:
    """The entries of all rows from those of their strips."""
    moments = {key: torch.cat([part.moments[key] for part in parts]) for key in parts[0].moments}
    return Entries(torch.cat([part.label for part in parts]), torch.cat([part.given for part in parts]), moments)


def _of_others(z: Tensor, moments: dict[Moment, Tensor], slopes: dict[Moment, Tensor], span: slice) -> Tensor:
    """The gradient of a strip of logits [n, V] by the formula of the module; given entries hold anything."""
    dz: Tensor | None = None
    for temperature in dict.fromkeys(t for _, t in slopes):
        a, b = (slopes.get((name, temperature)) for name in ("lse", "mean"))
        u = z if temperature == 1 else z / temperature
        e = (u - moments["lse", temperature][span, None]).exp_()
        if b is None:
            assert a is not None
            e *= a[span, None] / temperature
        else:
            factor = (u - moments["mean", temperature][span, None]).clamp_(min=-1e4).add_(1).mul_(b[span, None])
            e *= (factor if a is None else factor.add_(a[span, None])).div_(temperature)
        dz = e if dz is None else dz.add_(e)
    return torch.zeros_like(z) if dz is None else dz


def _set_entries_(dz: Tensor, ids: Tensor, slopes: Tensor | None, span: slice, *, split: bool) -> None:
    """The gradient of the given entries, of which a rank of a split vocabulary has some."""
    values = torch.zeros_like(ids, dtype=dz.dtype) if slopes is None else slopes[span]
    if not split:
        dz.scatter_(1, ids, values)
        return
    rows, places = ((ids >= 0) & (ids < dz.shape[1])).nonzero(as_tuple=True)
    dz[rows, ids[rows, places]] = values[rows, places]


def _add_label_(dz: Tensor, labels: Tensor, slope: Tensor | None, span: slice) -> None:
    """The gradient of the label's logit is added to its column, if it is one of these."""
    if slope is not None:
        value = torch.where((labels >= 0) & (labels < dz.shape[1]), slope[span], 0.0)
        dz.scatter_add_(1, labels.clamp(0, dz.shape[1] - 1)[:, None], value[:, None])

"""Losses of whole rows where the vocabulary is split: every rank works on its own columns, no row is gathered.

With lse_k the normalizer of softmax k and the loss a sum over columns of functions of logp_k = z / T_k - lse_k,

    g_k = d loss / d lse_k at constant z, summed over all columns
    dz = d loss / dz at constant lse + sum_k g_k p_k / T_k

A chunk of rows takes three visits of its products: for the normalizers, for the sums and g, for dz. After each of the
first two, the ranks exchange a few floats per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch import distributed as dist

from .problem import Problem
from .row_loss import RowLoss, tempered
from .shard import Shard, copy_to_ranks, sum_ranks
from .tiles import strips


def sums_over_ranks(loss: RowLoss, labels: Tensor, logits: list[Tensor], shard: Shard) -> dict[str, Tensor]:
    """The sums of whole rows from this rank's columns of their logits [n, V_r], with a graph of any order."""
    normalizers = {key: _normalizer(tempered(logits, key), shard) for key in loss.softmaxes}
    logp = [tempered(logits, key) - copy_to_ranks(normalizers[key], shard)[:, None] for key in loss.softmaxes]
    values = loss.over(labels, *logp)
    stacked = sum_ranks(torch.stack([*values.values()]), shard)
    return dict(zip(values, stacked, strict=True))


def _normalizer(z: Tensor, shard: Shard) -> Tensor:
    """log sum exp of whole rows [n] from this rank's columns, differentiable."""
    part = z.logsumexp(-1)
    largest = _largest(part.detach(), shard)
    share = (part - largest).exp().clone()  # written over, but needed by the exponential's backward
    return largest + sum_ranks(share, shard).log()


def differentiate_(
    loss: RowLoss, problem: Problem, tokens: slice, products: tuple[Tensor, Tensor | None], weight: Tensor, parts: int
) -> dict[str, Tensor]:
    """The sums of a chunk of tokens, [n] each; the products of the passes [n, k, V_r] become the gradient, in place."""
    shard = problem.head.shard
    assert shard is not None
    labels = problem.label_columns[tokens]
    keys = list(dict.fromkeys(loss.softmaxes))
    with torch.no_grad():
        lse = [
            torch.stack([tempered(z, k).logsumexp(-1) for k in keys]) for _, _, z in _logits(problem, products, parts)
        ]
        normalizers = _merged(torch.cat(lse, 1), shard)  # [K, n]
    trains, total, slopes = bool(problem.needs), [], []
    for span, _, logits in _logits(problem, products, parts):
        with torch.set_grad_enabled(trains):
            offsets = normalizers[:, span].detach().requires_grad_(trains)
            values = loss[span].over(labels[span], *_log_probs(loss, logits, dict(zip(keys, offsets, strict=True))))
            if trains:
                slopes.append(torch.autograd.grad((values["loss"] * weight[span]).sum(), offsets)[0])
        names = [*values]
        total.append(torch.stack([value.detach() for value in values.values()]))
    found = torch.cat([torch.cat(total, 1), torch.cat(slopes, 1)] if trains else [torch.cat(total, 1)])
    dist.all_reduce(found, group=shard.group)
    if trains:
        _gradient_(loss, (problem, products, parts), labels, weight, normalizers, found[len(names) :])
    return dict(zip(names, found, strict=False))


def _gradient_(
    loss: RowLoss,
    chunk: tuple[Problem, tuple[Tensor, Tensor | None], int],
    labels: Tensor,
    weight: Tensor,
    normalizers: Tensor,  # [K, n]
    slopes: Tensor,  # [K, n], g summed over ranks
) -> None:
    """Products of the passes -> their gradient, strip by strip."""
    passes, keys = chunk[1][0], list(dict.fromkeys(loss.softmaxes))
    for span, raw, logits in _logits(*chunk, trains=True):
        with torch.enable_grad():
            logp = dict(
                zip(
                    loss.softmaxes,
                    _log_probs(loss, logits, dict(zip(keys, normalizers[:, span], strict=True))),
                    strict=True,
                )
            )
            values = loss[span].over(labels[span], *(logp[key] for key in loss.softmaxes))
            total = (values["loss"] * weight[span]).sum()
            for key, slope in zip(keys, slopes[:, span], strict=True):
                if key[0] < passes.shape[1]:  # a second model is constant
                    total = total + (slope * logp[key].exp().sum(-1)).sum()
            passes[span] = torch.autograd.grad(total, raw)[0]


def _log_probs(loss: RowLoss, logits: list[Tensor], normalizers: dict[tuple[int, float], Tensor]) -> list[Tensor]:
    """The log-probabilities of each softmax over this rank's columns."""
    found = {key: tempered(logits, key) - lse[:, None] for key, lse in normalizers.items()}
    return [found[key] for key in loss.softmaxes]


def _logits(
    problem: Problem, products: tuple[Tensor, Tensor | None], parts: int, *, trains: bool = False
) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
    """Strip by strip: its rows, its products as a leaf, and the logits of all passes and of the second model."""
    others = None if products[1] is None else strips(products[1], parts)
    for span, strip in strips(products[0], parts):
        with torch.set_grad_enabled(trains):
            raw = strip.detach().requires_grad_(trains)
            logits = [*problem.head.activate(raw).unbind(1)]
            if others is not None and problem.payload is not None:
                logits.append(problem.payload[1].activate(next(others)[1]))
        yield span, raw, logits


def _merged(lse: Tensor, shard: Shard) -> Tensor:
    """The normalizers of whole rows from those of this rank's columns."""
    largest = _largest(lse, shard)
    total = (lse - largest).exp()
    dist.all_reduce(total, group=shard.group)
    return largest + total.log()


def _largest(x: Tensor, shard: Shard) -> Tensor:
    """The largest over ranks, finite."""
    largest = x.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=shard.group)
    return largest

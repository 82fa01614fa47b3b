"""Statistics and gradients of whole rows from those of every rank's columns, where the vocabulary is split over ranks.

Statistics and their upstream gradients are the same on every rank. Each rank folds its own columns; a few floats per
token then give the statistics of the whole row, with w_r = exp(lse_r - lse) the mass of rank r:

    lse = log sum_r e^lse_r     mean = sum_r (V_r / V) mean_r     entropy = sum_r w_r (H_r - log w_r)
    payload = sum_r w_r payload_r     variance = sum_r w_r (Var_r + (log w_r - H_r)^2) - entropy^2
    log_sum_sq = log sum_r w_r^2 e^log_sum_sq_r          rank = sum_r rank_r (`label_rank`)

The gradient of a rank's logits needs nothing else; only the gradient of the hidden states is a sum over ranks. That is
one collective of [statistics, N] floats per chunk of rows and one of [N, D], where gathered logits would be [N, V].
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .label_rank import counts_above
from .problem import Problem


def merge_ranks(problem: Problem, values: dict[str, Tensor], rows: slice = slice(None)) -> dict[str, Tensor]:
    """Statistics [N] of whole rows from those over this rank's columns; `values` itself if the head is not split."""
    head = problem.head
    if head.shard is None:
        return values
    columns = problem.label_columns[rows]
    on_this_rank = (columns >= 0) & (columns < head.size)
    local = {**values, "target": torch.where(on_this_rank, values["target"], 0.0)}
    if "mean" in local:
        local["mean"] = local["mean"] * (head.size / head.shard.size)
    if "top" in local:
        top = local["top"]
        local["peak"] = replace(head, shard=None).logit_of(problem.hidden[rows], top)  # of this rank's columns
        local["top"] = (top + head.shard.start).to(local["lse"].dtype)  # exact: no vocabulary has 2^24 tokens
    if "rank" in local:
        local["rank"] = counts_above(problem, rows)
    names = sorted(local)
    stacked = all_gather(torch.stack([local[name] for name in names]), head.shard.group)  # [ranks, statistics, N]
    return _whole_rows(dict(zip(names, stacked.unbind(1), strict=True)))


def _whole_rows(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """Statistics [N] from those of all ranks [ranks, N], by the formulas of the module docstring."""
    lse = part["lse"].logsumexp(0)
    log_w = part["lse"] - lse
    w, log_w = log_w.exp(), log_w.clamp(min=-1e4)
    merged = {"lse": lse, "target": part["target"].sum(0)}
    if "mean" in part:
        merged["mean"] = part["mean"].sum(0)
    if "payload" in part:
        merged["payload"] = (w * part["payload"]).sum(0)
    if "entropy" in part:
        merged["entropy"] = (w * (part["entropy"] - log_w)).sum(0)
    if "variance" in part:
        second_moment = part["variance"] + (log_w - part["entropy"]) ** 2
        merged["variance"] = (w * second_moment).sum(0) - merged["entropy"] ** 2
    if "log_sum_sq" in part:
        merged["log_sum_sq"] = (part["log_sum_sq"] + 2 * log_w).logsumexp(0)
    if "rank" in part:
        merged["rank"] = part["rank"].sum(0).long()
    if "top" in part:
        merged["top"] = part["top"].gather(0, part["peak"].argmax(0, keepdim=True)).squeeze(0).long()
    return merged


def sum_over_ranks(part: Tensor, problem: Problem) -> Tensor:
    """The sum of all ranks' parts, in place; the part itself if the head is not split."""
    if problem.head.shard is not None:
        dist.all_reduce(part, group=problem.head.shard.group)
    return part


def reduce_from_ranks(problem: Problem, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same gradients, those of hidden states summed in place over all ranks, each of which has a part."""
    if problem.head.shard is not None:
        for name in ("hidden", "payload_hidden"):
            if name in grads:
                dist.all_reduce(grads[name], group=problem.head.shard.group)
    return grads


def all_gather(x: Tensor, group: Any) -> Tensor:
    """The tensors of all ranks, of one shape: [ranks, ...]."""
    gathered = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group=group)
    return gathered

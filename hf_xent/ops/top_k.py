"""The k most probable tokens of every row, and the mass of all others, a chunk of rows at a time.

    logp_i = z_i / T - lse     rest = log sum_{j not among the k} e^(z_j / T) - lse

The mass of the others is summed over them, not taken from 1: a confident model leaves them less than float32 resolves
there. Of a vocabulary that is split over ranks, every rank offers its k best columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .functional import rows_in
from .head import Head
from .ranks import all_gather
from .request import Request
from .rows import autocast_for, autocast_head, check_head
from .shard import Shard
from .statistics import wide


class MostProbable(NamedTuple):
    """The k most probable tokens of every row, most probable first, and the mass of all others."""

    ids: Tensor
    """Token ids [..., k], int64."""
    logp: Tensor
    """Their log-probabilities [..., k], nats; -inf for a banned token."""
    rest: Tensor
    """The log-probability of all other tokens together [...]; -inf if there are none."""


@torch.no_grad()
def top_k_of(
    hidden: Tensor, head: Head, k: int, *, temperature: float = 1.0, memory_budget: int | None = None
) -> MostProbable:
    """The k most probable tokens of every hidden state, without gradient and without keeping logits.

    Args:
        hidden: Hidden states [..., D].
        head: The head that turns them into logits. If it is split over ranks, all of them must call.
        k: How many tokens, from 1 to the size of the vocabulary.
        temperature: T > 0 of the softmax of z / T.
        memory_budget: Bytes of logits in memory at a time, as in `hf_xent.vocab_stats`.

    Returns:
        Token ids, their log-probabilities and that of all others, in the dtype of statistics.

    Raises:
        ValueError: Hidden states and head do not fit, or an option is out of its range.
    """
    check_head(hidden, head)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= head.vocabulary:
        raise ValueError(f"k is {k!r}: pass a number of tokens from 1 to the head's {head.vocabulary}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature!r}: pass a positive number")
    shape, hidden, head = hidden.shape[:-1], autocast_for(head, hidden), autocast_head(head, hidden)
    rows, shard = hidden.reshape(-1, hidden.shape[-1]), head.shard
    budget = Request(memory_budget=memory_budget).budget(head, len(rows), hidden.element_size())
    step = rows_in(budget, head.size if shard is None else shard.width, hidden.dtype)  # the same on all ranks
    own = replace(head, shard=None).tempered(temperature)
    parts = []
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(rows), step):
            ids, z, others = _best(own.logits(rows[start : start + step]), k)
            if shard is not None:
                ids, z, others = _best_of_ranks(ids, z, others, shard, k)
            lse = torch.cat([z, others[:, None]], 1).logsumexp(1)
            parts.append(MostProbable(ids, z - lse[:, None], others - lse))
    if not parts:
        empty = rows.new_empty(0, k, dtype=wide(rows.dtype))
        parts = [MostProbable(empty.long(), empty, empty[:, 0])]
    ids, logp, rest = (torch.cat(found) for found in zip(*parts, strict=True))
    return MostProbable(ids.view(*shape, k), logp.view(*shape, k), rest.view(shape))


def _best(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of logits [n, V], which are lost: columns and logits of the k largest, and lse [n] of all others."""
    values, columns = z.topk(min(k, z.shape[1]), dim=1)
    return columns, values, z.scatter_(1, columns, -torch.inf).logsumexp(1)


def _best_of_ranks(columns: Tensor, z: Tensor, others: Tensor, shard: Shard, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same of whole rows, from every rank's columns; on a rank with fewer than k, nothing fills their places."""
    lowest, nothing = torch.finfo(z.dtype).min, (0, k - z.shape[1])
    offered = pad(z.clamp(min=lowest), nothing, value=-torch.inf)  # a banned token comes before nothing
    found = all_gather(torch.cat([offered, others[:, None]], 1), shard.group).transpose(0, 1)  # [n, ranks, k + 1]
    ids = all_gather(pad(columns + shard.start, nothing), shard.group).transpose(0, 1).flatten(1)
    offered, others = found[..., :k].flatten(1), found[..., k]
    values, places = offered.topk(k, dim=1)
    left = torch.cat([offered.scatter(1, places, -torch.inf), others], 1)
    values, left = (torch.where(x == lowest, -torch.inf, x) for x in (values, left))
    return ids.gather(1, places), values, left.logsumexp(1)

"""The most probable tokens of a teacher whose hidden states and head are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..losses.targets import TopK
from ..ops import Head, map_logits


class Top(NamedTuple):
    """The k most probable tokens of each row [N, k], their log-probabilities, and that of all others together [N]."""

    ids: Tensor
    logp: Tensor
    rest: Tensor


def top_k_of(hidden: Tensor, head: Head, k: int, *, temperature: float = 1.0, memory_budget: int | None = None) -> Top:
    """The k most probable tokens of each row, a few rows of logits at a time."""

    def best(logits: Tensor) -> Tensor:
        logp = (logits / temperature).log_softmax(-1)
        top, ids = logp.topk(k, -1)
        others = logp.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([top, ids.to(top.dtype), others], -1)  # float32 has every id below 2^24

    with torch.no_grad():
        found = map_logits(best, hidden, head, memory_budget=memory_budget)
    return Top(found[:, k:-1].long(), found[:, :k], found[:, -1])


def assembled(columns: Mapping[str, np.ndarray], device: torch.device, tail: str, temperature: float) -> TopK:
    """Targets from `ids` and `logp` [B, T, k] and `rest` [B, T]; where rest is NaN, the teacher has no opinion.

    There they are a valid distribution all the same.
    """
    ids, logp, rest = (torch.from_numpy(columns[name]).to(device) for name in ("ids", "logp", "rest"))
    k, mask = ids.shape[-1], ~rest.isnan()
    ids = torch.where(mask[..., None], ids.long(), torch.arange(k, device=device))
    logp = torch.where(mask[..., None], logp.float(), -math.log(k))
    return TopK(ids, logp, torch.where(mask, rest.float(), -torch.inf), tail, temperature, mask)

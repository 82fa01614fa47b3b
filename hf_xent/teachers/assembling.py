"""Columns of stored or served log-probabilities as targets of a batch."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from ..losses.targets import TopK


def assembled(columns: Mapping[str, np.ndarray], device: torch.device, tail: str, temperature: float) -> TopK:
    """Targets from `ids` and `logp` [B, T, k] and `rest` [B, T]; where rest is NaN, the teacher has no opinion.

    There they are a valid distribution all the same.
    """
    ids, logp, rest = (torch.from_numpy(columns[name]).to(device) for name in ("ids", "logp", "rest"))
    k, mask = ids.shape[-1], ~rest.isnan()
    ids = torch.where(mask[..., None], ids.long(), torch.arange(k, device=device))
    logp = torch.where(mask[..., None], logp.float(), -math.log(k))
    return TopK(ids, logp, torch.where(mask, rest.float(), -torch.inf), tail, temperature, mask)

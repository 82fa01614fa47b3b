"""Columns of stored or served log-probabilities as targets of a batch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ..losses.targets import TopK


def assembled(columns: Mapping[str, np.ndarray], device: torch.device, tail: str, temperature: float) -> TopK:
    """Targets from `ids` and `logp` [B, T, k] and `rest` [B, T]; where rest is NaN, the teacher has no opinion."""
    ids, logp, rest = (torch.from_numpy(columns[name]).to(device) for name in ("ids", "logp", "rest"))
    return TopK(ids.long(), logp.float(), rest.float(), tail, temperature, ~rest.isnan())

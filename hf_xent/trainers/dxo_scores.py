"""The scores of a classifier, one for each text: read from its logits, gathered from all ranks, and evaluated."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, distributed

from ..metrics import ranking


def scores_of(logits: Tensor) -> Tensor:
    """The score of each text [B], from the logits of a head with one label [B, 1] or two [B, 2]."""
    return logits[..., -1] - logits[..., 0] if logits.shape[-1] == 2 else logits[..., 0]


def gathered(x: Tensor, ranks: int) -> Tensor:
    """Gathers x [B], B equal on all ranks, to [ranks * B]; scales its gradient by `ranks`, since DDP averages."""
    if ranks == 1:
        return x
    value = x.detach().contiguous()
    parts = [torch.empty_like(value) for _ in range(ranks)]
    distributed.all_gather(parts, value)
    if x.requires_grad:
        parts[distributed.get_rank()] = value + ranks * (x - value)  # the same bits that other ranks have
    return torch.cat(parts)


def ranking_metrics(labels: np.ndarray, scores: np.ndarray, max_fpr: float, min_tpr: float) -> dict[str, float]:
    """Ranking metrics of scores [N] for labels [N] of both classes; `pauc` and `tpauc` are of a part of the curve."""
    return {
        "auroc": ranking.auroc(labels, scores),
        "ap": average_precision_score(labels, scores),
        "pauc": ranking.pauc(labels, scores, max_fpr),
        "tpauc": ranking.tpauc(labels, scores, max_fpr, min_tpr),
        "tpr_1": ranking.tpr_at_fpr(labels, scores, 0.01),
        "tpr_5": ranking.tpr_at_fpr(labels, scores, 0.05),
    }

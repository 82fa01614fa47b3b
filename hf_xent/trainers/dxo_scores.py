"""Scores of a classifier, one a text: off its logits, of all ranks, and the metrics of their ranking."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, distributed

from ..metrics import ranking


def scores_of(logits: Tensor) -> Tensor:
    """One logit a text [B], of a head with one label [B, 1] or two [B, 2]."""
    return logits[..., -1] - logits[..., 0] if logits.shape[-1] == 2 else logits[..., 0]


def gathered(x: Tensor, ranks: int) -> Tensor:
    """x [B] of all ranks [ranks * B], of equal B; this rank's part has `ranks` times its gradient, as DDP averages."""
    if ranks == 1:
        return x
    value = x.detach().contiguous()
    parts = [torch.empty_like(value) for _ in range(ranks)]
    distributed.all_gather(parts, value)
    if x.requires_grad:
        parts[distributed.get_rank()] = value + ranks * (x - value)  # the value to the last bit, as other ranks have it
    return torch.cat(parts)


def ranking_metrics(labels: np.ndarray, scores: np.ndarray, max_fpr: float, min_tpr: float) -> dict[str, float]:
    """Metrics of scores [N] for labels [N] of both classes; `pauc` and `tpauc` of a part of the curve."""
    return {
        "auroc": ranking.auroc(labels, scores),
        "ap": average_precision_score(labels, scores),
        "pauc": ranking.pauc(labels, scores, max_fpr),
        "tpauc": ranking.tpauc(labels, scores, max_fpr, min_tpr),
        "tpr_1": ranking.tpr_at_fpr(labels, scores, 0.01),
        "tpr_5": ranking.tpr_at_fpr(labels, scores, 0.05),
    }

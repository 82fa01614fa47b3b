"""The losses of several passes of a model over one batch, as sums over columns of their log-probabilities.

They are what `hf_xent.ops.divergences` streams: logits [n, V] of each pass become a loss and gradients a few at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.row_loss import RowLoss, at_labels


def noisefit(
    *,
    ce_weight: float = 0.5,
    consistency_weight: float = 0.1,
    temperature: float = 1.0,
    version: str = "v1",
) -> RowLoss:
    """NoiseFiT's hybrid loss of a clean and two noisy passes per token, nats, and its soft cross-entropy, `divergence`.

        loss = alpha CE(p) + (1 - alpha) soft + lambda consistency
        soft = 1/2 sum_i KL(p_T || p_i)        consistency = KL(p_2 || p_1)

    In version 'v2' both sides of both divergences have the temperature T, these are multiplied by T^2, and p_T and p_2
    are constants on their left.
    """

    def sums(labels: Tensor, logp: Tensor, teacher: Tensor, *noisy: Tensor) -> dict[str, Tensor]:
        teacher, q1, q2 = (_finite(x) for x in (teacher, *noisy))
        other, factor = q2, 1.0
        if version == "v2":
            teacher, other, factor = teacher.detach(), q2.detach(), temperature**2
        soft = factor * _divergence(teacher, (q1 + q2) / 2)  # linear in log p_i, so that of their mean is both's mean
        divergences = (1 - ce_weight) * soft + consistency_weight * factor * _divergence(other, q1)
        return {"loss": divergences - ce_weight * at_labels(logp, labels), "divergence": soft}

    noisy = 1.0 if version == "v1" else temperature
    return RowLoss(sums, ((0, 1.0), (0, temperature), (1, noisy), (2, noisy)))


def rdrop(*, weight: float = 1.0) -> RowLoss:
    """R-Drop's loss of two passes per token: their mean cross-entropy, and `weight` times half of both divergences."""

    def sums(labels: Tensor, p: Tensor, q: Tensor) -> dict[str, Tensor]:
        cross_entropies = -at_labels(p, labels) - at_labels(q, labels)
        p, q = _finite(p), _finite(q)
        return {"loss": (cross_entropies + weight * (_divergence(p, q) + _divergence(q, p))) / 2}

    return RowLoss(sums, ((0, 1.0), (1, 1.0)))


def _finite(logp: Tensor) -> Tensor:
    """log p with a finite number for banned tokens (-inf), so that they add nothing to a divergence: 0 times that."""
    return logp.clamp(min=torch.finfo(logp.dtype).min / 2)


def _divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) of each row [n]; both are finite."""
    return torch.linalg.vecdot(logp.exp(), logp - logq)

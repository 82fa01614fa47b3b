"""Supervised contrastive learning beside cross-entropy: rows of one class attract each other, and repel all others.

    CE(z, y) + eta mean_i mean_{j in P(i)} -log pi_ij,  pi_ij = exp(v_i . v_j / tau) / sum_{k != i} exp(v_i . v_k / tau)

v is a projection of the features to unit length: two layers, D -> D -> 256, which are trained with the model and left
out of its files. P(i) are the other rows of the class of row i in the batch; a row that is alone in its class is left
out of the mean over i. So the loss is one of the batch, and needs batches with several rows of a class. With eta 0 it
is cross-entropy.

Source: Khosla et al. 2020, Supervised Contrastive Learning, arXiv:2004.11362, the form with the mean outside of the
logarithm; beside cross-entropy in Gunel et al. 2021, arXiv:2011.01403. There the rows of an image are two views of it;
here each row is given once. The weight 1 and the width of the projection are choices of this library.
Relations: `core_tuning` adds mixed rows and the focal weight 1 - pi; `pairs` compares the outputs of rows instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..options.ranges import check_count
from .base import ClassLoss


@dataclass(frozen=True)
class SupCon(ClassLoss):
    """Cross-entropy, and the contrastive loss of projected features; see the module's docstring."""

    eta: float = 1.0
    """The weight of the contrastive loss."""
    temperature: float = 0.07
    """tau, which divides the similarities."""
    projection: int = 256
    """The width of the projected features."""
    needs: ClassVar[tuple[str, ...]] = ("features", "state")
    per_row: ClassVar[bool] = False
    ranges: ClassVar[dict[str, str]] = {"eta": "[0, inf)", "temperature": "(0, inf)"}

    def __post_init__(self) -> None:
        check_count("projection", self.projection, 1)
        super().__post_init__()

    def state(self, features: int, classes: int) -> nn.Module:
        """The projection D -> D -> `projection`."""
        return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, self.projection))

    def __call__(self, logits: Tensor, labels: Tensor, **given: Any) -> Tensor:
        """The loss, a scalar, of logits [N, K], labels [N], features [N, D] and the projection as `state`; 0 if N = 0.

        Raises:
            KeyError: Features or state are missing.
        """
        cross_entropy = F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))
        vectors = F.normalize(through(given["state"], given["features"], logits.dtype), dim=-1)
        targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        return cross_entropy + self.eta * supervised_contrastive(vectors, targets, self.temperature)

    def reference(self, logits: Any, labels: Any, **given: Any) -> np.ndarray:
        """mean_i -log p_y + eta times the contrastive loss, row by row."""
        z, targets = np.asarray(logits, np.float64), np.eye(np.shape(logits)[1])[np.asarray(labels)]
        cross_entropy = -(targets * (z - np.log(np.exp(z).sum(1, keepdims=True)))).sum(1).mean()
        vectors = projected(given["state"], given["features"])
        return np.asarray(cross_entropy + self.eta * contrasted(vectors, targets, self.temperature, focal=False))


def supervised_contrastive(vectors: Tensor, targets: Tensor, temperature: float = 0.07, focal: bool = False) -> Tensor:
    """The supervised contrastive loss of a batch, also of soft labels: rows attract by what their labels share.

        mean_i [sum_{j != i} w_ij l_ij / sum_{j != i} w_ij],  w_ij = t_i . t_j,  l_ij = -log pi_ij, or its focal form

    Args:
        vectors: The rows [N, P], of unit length as a rule.
        targets: The labels [N, K] as probabilities; one-hot ones make w the indicator of the same class.
        temperature: What divides the similarities v_i . v_j.
        focal: Whether l_ij is -(1 - pi_ij) log pi_ij, which weighs pairs less that are close already.

    Returns:
        A scalar, the mean over rows i that share a class with another row; 0 without any.
    """
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    similarities = vectors @ vectors.T / temperature
    log_pi = similarities.masked_fill(itself, torch.finfo(vectors.dtype).min).log_softmax(-1)
    log_pi = log_pi.masked_fill(itself, 0)
    costs = log_pi.expm1() * log_pi if focal else -log_pi  # expm1 is pi - 1
    weights = (targets @ targets.T).masked_fill(itself, 0)
    shared = weights.sum(-1)
    rows = (weights * costs).sum(-1) / shared.where(shared > 0, 1)
    return rows.sum() / (shared > 0).sum().clamp(min=1)


def through(module: nn.Module, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What a layer makes of rows, computed in the layer's dtype and returned in another."""
    made: Tensor = module(rows.to(next(module.parameters()).dtype))
    return made.to(dtype)


def projected(state: Any, features: Any) -> np.ndarray:
    """For references: the projection of features, of unit length, in float64."""
    (w1, b1), (w2, b2) = (
        (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()) for layer in (state[0], state[2])
    )
    made = np.maximum(np.asarray(features, np.float64) @ w1.T + b1, 0) @ w2.T + b2
    return made / np.sqrt((made**2).sum(1, keepdims=True))


def contrasted(vectors: np.ndarray, targets: np.ndarray, temperature: float, focal: bool) -> float:
    """For references: the contrastive loss by its formula, one anchor at a time."""
    means = []
    for i in range(len(vectors)):
        others = [k for k in range(len(vectors)) if k != i]
        strengths = np.exp(vectors[others] @ vectors[i] / temperature)
        pi, weights = strengths / strengths.sum(), targets[others] @ targets[i]
        if weights.sum() > 0:
            means.append((weights * -np.log(pi) * ((1 - pi) if focal else 1)).sum() / weights.sum())
    return float(np.mean(means)) if means else 0.0

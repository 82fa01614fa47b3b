"""The dense reference: statistics from their definitions on [N, V] logits, gradients by autograd. Small inputs only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from .problem import TENSORS, Problem


def statistics(
    z: Tensor, labels: Tensor, payload: Tensor | None = None, mean_weight: Tensor | None = None
) -> dict[str, Tensor]:
    """Every statistic [N] of logits z [N, V] and their labels [N]; also of the payload's logits [N, V], if any.

    `mean_weight` [V], if any, has the factors of the logits in the mean.
    """
    logp = z.log_softmax(-1)
    p = logp.exp()
    cheap = without_softmax(z, labels, mean_weight)
    finite = logp.clamp(min=-1e4)  # 0 * -inf is 0 here: a banned token adds no entropy
    entropy = -(p * finite).sum(-1)
    return {
        **cheap,
        "entropy": entropy,
        "variance": (p * (finite + entropy[:, None]) ** 2).sum(-1),
        "payload": (p * (torch.zeros_like(z) if payload is None else payload)).sum(-1),
        "top": z.argmax(-1),
        "rank": (z > cheap["target"][:, None]).sum(-1),
        "log_sum_sq": (2 * logp).logsumexp(-1),
    }


def without_softmax(z: Tensor, labels: Tensor, mean_weight: Tensor | None = None) -> dict[str, Tensor]:
    """The statistics [N] that keep no probabilities [N, V]."""
    target = z.gather(-1, labels[:, None]).squeeze(-1)
    mean = z.mean(-1) if mean_weight is None else z @ mean_weight / z.shape[-1]
    return {"lse": z.logsumexp(-1), "target": target, "mean": mean}


def forward(problem: Problem) -> dict[str, Tensor]:
    """Every requested statistic, [N] each."""
    payload = problem.payload[1].logits(problem.payload[0]) if problem.payload else None
    values = statistics(problem.head.logits(problem.hidden), problem.labels, payload, problem.mean_weight)
    return {name: value for name, value in values.items() if name in problem.outputs}


def backward(problem: Problem, values: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of `sum(grads * statistics)` for every tensor in `problem.needs`."""
    leaves = {
        name: t.detach().requires_grad_() for name, t in zip(TENSORS, problem.tensors, strict=True) if t is not None
    }
    with torch.enable_grad():
        recomputed = forward(problem.with_tensors(tuple(leaves.get(name) for name in TENSORS), problem.labels))
        total = cast(Tensor, sum((recomputed[name] * grad).sum() for name, grad in grads.items()))  # grads is not empty
    names = [name for name in TENSORS if name in problem.needs]
    gradients = torch.autograd.grad(total, [leaves[name] for name in names], allow_unused=True)
    pairs = zip(names, gradients, strict=True)
    return {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in pairs}

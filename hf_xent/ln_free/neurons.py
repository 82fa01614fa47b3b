"""Confidence neurons, which regulate a model's confidence: found by their output weights, and ablated to their means.

    score(w_i) = |w_i| / LogitVar(w_i)      LogitVar(w) = variance over the vocabulary of (w_v . w) / (|w_v| |w|)

LogitVar is w' C w / |w|^2, C the covariance of the vocabulary's unit vectors, D x D.

Source: Stolfo et al. 2024, arXiv:2406.16254.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def confidence_neurons(projection: nn.Module, head: Tensor, count: int) -> Tensor:
    """Indices of the neurons with the largest scores, from an MLP's output projection and the head's weight [V, D].

    A neuron whose output weights are zero comes last. Raises: ValueError for more neurons than there are.
    """
    weight: Any = projection.weight
    weight = (weight.T if isinstance(projection, nn.Linear) else weight).detach().double()  # [neurons, D]
    unit = torch.nn.functional.normalize(head.detach().double(), dim=-1)
    covariance = unit.T @ unit / len(unit) - torch.outer(unit.mean(0), unit.mean(0))
    size = weight.norm(dim=-1)
    spread = ((weight @ covariance) * weight).sum(-1) / size.square()
    score = (size / spread).where(size != 0, -math.inf)
    if count > len(score):
        raise ValueError(f"neurons is {count}, but the last MLP has {len(score)}: choose no more than that")
    return score.topk(count).indices


@contextmanager
def held_at_means(projection: nn.Module, neurons: Tensor, means: Tensor) -> Iterator[None]:
    """Replaces the activations of neurons by their means, at the input of the output projection."""

    def hold(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].clone()
        x[..., neurons] = means[neurons].to(x)
        return (x, *args[1:])

    handle = projection.register_forward_pre_hook(hold)
    try:
        yield
    finally:
        handle.remove()

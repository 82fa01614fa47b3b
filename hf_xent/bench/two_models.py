"""Contestants of objectives with a teacher: divergences of a student and a teacher with the same head.

The teacher's hidden states are the student's with noise of three tenths of their size, so that it is as sure as the
student and often of something else. All get the student's leaves, and have the teacher before their time starts.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ..losses.base import Loss
from ..losses.forward_kl import ForwardKL
from ..losses.jsd import JSD
from ..losses.reverse_kl import ReverseKL
from ..ops import Head
from .objectives import FORWARD_KL, OBJECTIVES, REVERSE_KL, SYMMETRIC

NOISE = 0.3
LOSSES: dict[str, Loss] = {FORWARD_KL: ForwardKL(), REVERSE_KL: ReverseKL(), SYMMETRIC: JSD()}
BETAS = {FORWARD_KL: 0.0, REVERSE_KL: 1.0, SYMMETRIC: 0.5}
"""TRL's names of the same."""


@lru_cache(maxsize=1)
def teacher_of(hidden: Tensor) -> Tensor:
    """The teacher's hidden states [N, D], the same for all contestants; made once in each process."""
    wide, generator = hidden.detach().float(), torch.Generator().manual_seed(0)
    noise = torch.randn(hidden.shape, generator=generator).to(hidden.device)
    size = wide.square().mean(-1, keepdim=True).sqrt()
    return (wide + NOISE * size * noise).to(hidden.dtype)


def dense(hidden: Tensor, weight: Tensor, labels: Tensor, objective: str) -> Tensor:
    """Plain torch with float32 logits of both models."""
    logits = F.linear(hidden, weight).float()
    with torch.no_grad():
        teacher = F.linear(teacher_of(hidden), weight).float()
    return OBJECTIVES[objective].on_logits(logits, labels, teacher).mean()


def streamed(hidden: Tensor, weight: Tensor, labels: Tensor, objective: str) -> Tensor:
    """Our loss, in one visit of both models."""
    return LOSSES[objective](hidden, Head(weight), labels, teacher=(teacher_of(hidden), Head(weight.detach())))


def trl(hidden: Tensor, weight: Tensor, labels: Tensor, objective: str) -> Tensor:
    """TRL's fused divergence, as its DistillationTrainer calls it."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    other = teacher_of(hidden)
    losses, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, None, other, weight.detach(), None, BETAS[objective], 1.0, 1.0, None, 1.0, None
    )
    mean: Tensor = losses.mean()
    return mean


@torch.no_grad()
def matmuls(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, logits: Tensor, hidden_out: Tensor, weight_out: Tensor
) -> Tensor:
    """The four matrix products and nothing else: both models' logits and the student's gradients."""
    torch.mm(teacher_of(hidden), weight.T, out=logits)
    torch.mm(hidden, weight.T, out=logits)
    torch.mm(logits, weight, out=hidden_out)
    torch.mm(logits.T, hidden, out=weight_out)
    return hidden.detach()[0, 0]

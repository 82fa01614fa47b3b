"""The Kullback-Leibler divergence of two softmaxes over one vocabulary, from statistics, without logits.

    KL(p || q) = lse_q - (H_p + sum_j p_j z_qj)

The expected logit, sum_j p_j z_qj, is the payload of p's softmax: one visit of both heads computes it.
"""

from __future__ import annotations

from torch import Tensor

from ..ops import Payload
from ..ops.dispatch import stream_stats
from ..ops.request import Request


def expected_logit(p: Payload, q: Payload, labels: Tensor, request: Request) -> Tensor:
    """`H_p + sum_j p_j z_qj` in the shape of labels, nats; p and q are (hidden [..., D], head)."""
    stats = stream_stats(*p, labels, ("entropy", "payload"), request, q)
    return stats.entropy + stats.payload


def divergence(p: Payload, q: Payload, labels: Tensor, request: Request) -> Tensor:
    """KL(softmax of p's logits || softmax of q's) in the shape of labels, nats, 0 at ignored positions."""
    return stream_stats(*q, labels, ("lse",), request).lse - expected_logit(p, q, labels, request)

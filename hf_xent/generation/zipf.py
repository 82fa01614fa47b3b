"""How many of the likeliest tokens version 1 of Mirostat keeps: a Zipf law is fitted to the largest probabilities.

For the first 100 probabilities p_(1) >= p_(2) >= ... of V tokens, s by least squares on their log ratios, e = s - 1:

    s = sum_i t_i b_i / sum_i t_i^2     t_i = log((i + 1) / i)     b_i = log(p_(i) / p_(i+1))     i = 1 ... 99
    k = (e 2^mu / (1 - V^-e))^(1 / s)   and (2^mu / log V)^(1 / s) for s = 1; rounded, within 1 ... V

This file imports nothing of hf_xent: it goes with `mirostat` into its Hub repository.

Source: Basu, Ramachandran, Keskar, Varshney 2021, Mirostat, arXiv:2007.14966, algorithm 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FITTED = 100  # the number of probabilities to which the Zipf law is fitted


def by_zipf(logp: Tensor, mu: Tensor) -> Tensor:
    """Version 1: which tokens [B, V] are among the k likeliest; tokens of probability 0 are left out of the fit."""
    ordered, order = logp.sort(stable=True, dim=-1, descending=True)
    top = ordered[:, : min(FITTED, logp.shape[-1])].double()
    t = torch.arange(1, top.shape[-1], device=logp.device).double()
    t = ((t + 1) / t).log()
    valid = top[:, 1:].isfinite()
    b = torch.where(valid, top[:, :-1] - top[:, 1:], 0.0)
    s = ((t * b).sum(-1) / (t**2 * valid).sum(-1).clamp(min=1e-9)).clamp(min=1e-3)  # equal probabilities: k is 1 or V
    k = zipf_k(s, mu.double(), logp.shape[-1])
    rank = torch.arange(logp.shape[-1], device=logp.device)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, rank < k[:, None])


def zipf_k(s: Tensor, mu: Tensor, vocabulary: int) -> Tensor:
    """k [B] of version 1 for exponents s [B] and bounds mu [B], in logarithms: 2^mu and V^-e may overflow."""
    e, log_v = s - 1, math.log(vocabulary)
    near_zero = e.abs() < 1e-6
    safe = torch.where(near_zero, 1.0, e)
    ratio = torch.where(near_zero, 1 / log_v, safe / -torch.expm1(-safe * log_v))  # e / (1 - V^-e), always positive
    log_k = (ratio.log() + mu * math.log(2)) / s
    return log_k.clamp(max=log_v).exp().round().clamp(1, vocabulary)

"""Losses, entropy and calibration of a model over many tokens, streamed: a few floats per token, no logits.

loss    mean, median, 95th and 99th percentile of -log p_y, nats: a mean can hide a few tokens with huge losses
ECE     as `hf_xent.metrics.calibration` defines it; the confidence of a token comes from a second pass over the head,
        with the most likely token as the label
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..metrics.calibration import BINS, binned, calibration_error
from ..ops import vocab_stats


class Tokens:
    """Losses, entropy and calibration over tokens, which keep a few floats per token."""

    def __init__(self) -> None:
        self.nll: list[Tensor] = []
        self.entropy: list[Tensor] = []
        self.bins = torch.zeros(3, BINS, dtype=torch.float64)  # number of tokens, of correct ones, sum of confidences

    def add(self, model: Any, ids: Tensor) -> None:
        """Runs the model on a batch [B, T]."""
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        stats = logits.stats(ids[:, 1:], outputs=("lse", "target", "entropy", "top"))
        best = logits.with_head(lambda hidden, head: vocab_stats(hidden, head, stats.top, outputs=("lse", "target")))
        self.nll.append(stats.nll.flatten().cpu())
        self.entropy.append(stats.entropy.flatten().cpu())
        self.bins += binned(best.logp.exp().flatten().cpu(), stats.is_top1.flatten().cpu())

    def summary(self) -> dict[str, Any]:
        """These fields of `Analysis`."""
        nll, tokens = torch.cat(self.nll).double(), float(self.bins[0].sum())
        median, p95, p99 = (float(x) for x in nll.quantile(torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64)))
        return {
            "loss": float(nll.mean()),
            "median": median,
            "p95": p95,
            "p99": p99,
            "entropy": float(torch.cat(self.entropy).double().mean()),
            "accuracy": float(self.bins[1].sum()) / tokens,
            "ece": calibration_error(self.bins),
        }

"""Losses of tokens that several candidates share: the statistics of a position once, however many tokens follow it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..lazy import LazyLogits
from ..ops import Head
from .trees import Edges


def add_losses(sums: Tensor, logits: Tensor, edges: Edges) -> None:
    """Add the losses of a batch's edges to the candidates that contain them.

    Args:
        sums: The sums [C] so far, float64, nats; changed in place.
        logits: The logits [..., V] of the batch, lazy unless the model computes with them itself.
        edges: What is predicted where.
    """
    if len(edges.tokens):
        losses = edge_losses(logits, edges.rows, edges.tokens)
        sums.index_add_(0, edges.candidates, losses[edges.edges])


def edge_losses(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """-log p of tokens after some positions, without a row of logits that outlives its chunk.

    Args:
        logits: The logits [..., V].
        rows: The flat position [E] of each prediction; positions may be repeated.
        tokens: The token [E] that is predicted there.

    Returns:
        Nats [E], float64, on the CPU.
    """
    device = logits.device
    positions, place = rows.unique(return_inverse=True)
    first = torch.full_like(positions, len(rows)).scatter_reduce(0, place, torch.arange(len(rows)), "amin")
    at = logits.reshape(-1, logits.shape[-1])[positions.to(device)]
    if not isinstance(at, LazyLogits):  # the model computes with its logits itself
        lse, target = at.float().logsumexp(-1), at.float()[place.to(device), tokens.to(device)]
        return (lse[place.to(device)] - target).double().cpu()
    stats = at.stats(tokens[first].to(device), outputs=("lse", "target"))
    lse, target = stats.lse.double().cpu()[place], stats.target.double().cpu()[place]
    repeated = torch.ones(len(rows), dtype=torch.bool).index_fill(0, first, False)
    if repeated.any():
        target[repeated] = _targets(at, place[repeated], tokens[repeated])
    return lse - target


def _targets(at: LazyLogits, place: Tensor, tokens: Tensor) -> Tensor:
    """Logits [E] of more than one token at a position: those of all these tokens at all these positions, a small grid.

    Both numbers are at most those of a batch, so the grid is far smaller than the logits would be.
    """
    (rows, i), (columns, j) = (x.unique(return_inverse=True) for x in (place, tokens))

    def compute(hidden: Tensor, head: Head) -> Any:
        return head[columns.to(hidden.device)].logits(hidden[rows.to(hidden.device)])

    return at.with_head(compute).double().cpu()[i, j]

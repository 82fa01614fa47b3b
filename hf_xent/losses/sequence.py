"""Base of the losses over sequences: each run of labels, with every label's log-probability at all of its positions."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import Head, Payload, Stats
from ..ops.dispatch import stream_stats
from ..ops.request import Request
from ..ops.statistics import wide
from ..options.ranges import check_number
from .base import Loss, apply_weights, select_valid


@dataclass(frozen=True)
class SequenceLoss(Loss):
    """Base of losses that compare positions of a sequence with each other; hidden [B, T, D], labels [B, T].

    A run is a maximal stretch of labeled positions in a row of labels: an answer, a turn, a document without padding.
    A subclass writes `of_run`; log p_i(y_j) = h_i . W[y_j] - lse_i is one small product. Plain cross-entropy may be
    added.
    """

    ce_factor: float = field(default=0.0, kw_only=True)
    """Weight of plain cross-entropy, which is added."""

    def __post_init__(self) -> None:
        check_number(self, "ce_factor", "[0, inf)", "choose a finite number >= 0")

    @property
    def uses(self) -> tuple[str, ...]:  # type: ignore[override]  # a constant in the base, here it depends on fields
        """The statistics that it differentiates: `target` only with cross-entropy."""
        return ("lse", "target") if self.ce_factor else ("lse",)

    def of(self, stats: Stats) -> Tensor:
        """The cross-entropy part; without it a 0 that keeps the graph connected if there is no run."""
        return self.ce_factor * stats.nll if self.ce_factor else 0 * stats.lse

    def of_run(self, logp: Tensor) -> Tensor:
        """Per-token loss [T] of a run from log p_i(y_j) at output position i for the label of position j, [T, T]."""
        raise NotImplementedError

    def per_token(
        self, hidden: Tensor, head: Head, labels: Tensor, weight: Tensor, teacher: Payload | None, request: Request
    ) -> tuple[Tensor, Stats]:
        """One visit of the vocabulary for the statistics, one [T, T] product per run."""
        stats = stream_stats(hidden, head, labels, (*self.uses, *request.observe), request)
        positions = stats.mask.reshape(-1).nonzero().squeeze(-1)
        ids, dtype = labels.reshape(-1)[positions], wide(hidden.dtype)
        lse = stats.lse.reshape(-1)[positions]
        # one gather for all runs, since the gradient of each gather is a dense [V, D]
        columns, states = head[ids].to(dtype), hidden.reshape(-1, hidden.shape[-1])[positions].to(dtype)
        losses = [lse[:0]]
        for run in _runs(stats.mask):
            losses.append(self.of_run(columns[run].logits(states[run]) - lse[run, None]))
        loss = self.of(stats).reshape(-1).index_add(0, positions, torch.cat(losses)).reshape(labels.shape)
        return apply_weights(loss, weight, stats, request)

    def of_logits(self, logits: Tensor, stats: Stats) -> Tensor:
        """The same from logits that already exist, [..., T, V]."""
        rows = select_valid(stats)
        logp = logits[stats.mask].to(rows.lse.dtype) - rows.lse[:, None]
        losses = [self.of_run(logp[run][:, rows.labels[run]]) for run in _runs(stats.mask)]
        return self.of(rows) + torch.cat([rows.lse[:0], *losses])


def _runs(mask: Tensor) -> list[slice]:
    """The runs of True in the rows of a mask, in reading order, as slices of the True positions."""
    rows = torch.atleast_1d(mask).int()
    edges = F.pad(rows.reshape(rows.shape[:-1].numel(), rows.shape[-1]), (1, 1)).diff()  # 1 at a start, -1 past an end
    ends = ((edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]).cumsum(0).tolist()
    return [slice(start, end) for start, end in pairwise([0, *ends])]

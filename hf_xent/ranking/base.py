"""The base of ranking losses, which raise the area under a ROC or precision-recall curve of scores h and labels.

i runs over the positives of a batch, j over its negatives (over all for AP); l_ij = surrogate(margin, h_i - h_j), where

    squared_hinge  max(m - t, 0)^2      hinge  max(m - t, 0)      squared  (m - t)^2      logistic  log(1 + exp(-m t))

A loss is mean_ij p_ij l_ij with weights p that carry no gradient and depend on a state: numbers s_i, u_i of each
positive training row, and scalars, which are moving averages over the batches. Exponentials are kept as logarithms,

    log u <- logaddexp(log(1 - gamma) + log u, log gamma + logmeanexp_j l_ij / lambda)

so that logits of any size do not overflow. By default h = sigmoid(logit), in [0, 1] as the published margins expect.

The averages start from zero without a bias correction, as published: a row's first value is gamma times that of its
batch, or, with `first_touch`, equal to it.

Source: the formulas of LibAUC 2.0.1 (Yuan et al., KDD 2023), reimplemented; each loss names its paper. Two changes:
AUCM is its documented version 2, where the code misplaces a parenthesis; a batch of one class is a zero loss, not nan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..options.ranges import check_fields

State = dict[str, Tensor]

SURROGATES: dict[str, Callable[[float, Tensor], Tensor]] = {
    "squared_hinge": lambda margin, t: (margin - t).clamp(min=0).square(),
    "hinge": lambda margin, t: (margin - t).clamp(min=0),
    "squared": lambda margin, t: (margin - t).square(),
    "logistic": lambda margin, t: F.softplus(-margin * t),
}
"""Name -> loss of a pair, a function of the margin and t = h_i - h_j."""


@dataclass(frozen=True)
class RankingLoss:
    """A ranking loss: `state` is its state before the first batch, `step` computes the loss of one batch."""

    ranges: ClassVar[dict[str, str]] = {}
    """The interval of each option that is a number; the others are True or False, or check themselves."""
    both: ClassVar[bool] = True
    """Whether a batch needs both classes."""

    def __post_init__(self) -> None:
        check_fields(self, self.ranges)

    def state(self, rows: int) -> State:
        """The state before the first batch: scalars, and tensors [rows] with one entry for each training row."""
        return {}

    def scores(self, logits: Tensor) -> Tensor:
        """h, from logits of any shape."""
        return logits

    def step(self, pos: Tensor, neg: Tensor, state: State) -> tuple[Tensor, State]:
        """The loss of positives' scores [P] and negatives' [N], and the next state; [rows] are the positives' [P]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Bounded(RankingLoss):
    """Losses of scores in [0, 1] that require a margin."""

    margin: float = 1.0
    """m: how far a positive should be above a negative."""
    sigmoid: bool = True
    """h = sigmoid(logit); else h is the logit."""
    ranges: ClassVar[dict[str, str]] = {"margin": "(0, inf)"}

    def scores(self, logits: Tensor) -> Tensor:
        """Probabilities, or the logits."""
        return logits.sigmoid() if self.sigmoid else logits


@dataclass(frozen=True)
class Pairwise(Bounded):
    """Losses that are a sum over pairs."""

    surrogate: str = "squared_hinge"
    """Loss of a pair: 'squared_hinge', 'hinge', 'squared' or 'logistic' (there the margin is a scale)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.surrogate not in SURROGATES:
            raise ValueError(f"surrogate is {self.surrogate!r}: choose one of {', '.join(SURROGATES)}")

    def pairs(self, pos: Tensor, other: Tensor) -> Tensor:
        """l [P, N]."""
        return SURROGATES[self.surrogate](self.margin, pos[:, None] - other[None, :])


def logmeanexp(values: Tensor) -> Tensor:
    """log mean exp over the last dimension."""
    return values.logsumexp(-1) - math.log(values.shape[-1])


def moving_average(log_old: Tensor, log_new: Tensor, gamma: float, first_touch: bool = False) -> Tensor:
    """log((1 - gamma) old + gamma new) of logarithms; with `first_touch`, new itself where old is 0."""
    keep = math.log1p(-gamma) if gamma < 1 else -math.inf
    mixed = torch.logaddexp(log_old + keep, log_new + math.log(gamma))
    return torch.where(log_old == -torch.inf, log_new, mixed) if first_touch else mixed

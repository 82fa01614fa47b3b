"""Losses of a ranking: of scores h and labels, by the area under the ROC or precision-recall curve that they raise.

i runs over the positives of a batch, j over its negatives (over all for AP); l_ij = surrogate(margin, h_i - h_j), where

    squared_hinge  max(m - t, 0)^2      hinge  max(m - t, 0)      squared  (m - t)^2      logistic  log(1 + exp(-m t))

A loss is mean_ij p_ij l_ij with weights p that carry no gradient and lean on a state: numbers s_i, u_i of each positive
training row and scalars, moving averages over the batches it was in. Exponentials stay logarithms throughout,

    log u <- logaddexp(log(1 - gamma) + log u, log gamma + logmeanexp_j l_ij / lambda)

so that raw logits of any size are fine. By default h = sigmoid(logit), in [0, 1] as the published margins expect.

The averages start from zero without a correction, as published: first values are 1/gamma of what they settle to, or
with `first_touch` that itself.

Source: the formulas of LibAUC 2.0.1 (Yuan et al., KDD 2023), written anew; the papers stand at each loss. Two changes:
AUCM is its documented version 2, where the code misplaces a parenthesis; a batch of one class is a zero loss, not nan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..options.ranges import check_flag, check_number

State = dict[str, Tensor]

SURROGATES: dict[str, Callable[[float, Tensor], Tensor]] = {
    "squared_hinge": lambda margin, t: (margin - t).clamp(min=0).square(),
    "hinge": lambda margin, t: (margin - t).clamp(min=0),
    "squared": lambda margin, t: (margin - t).square(),
    "logistic": lambda margin, t: F.softplus(-margin * t),
}
"""Name -> loss of a pair, of the margin and t = h_i - h_j."""


@dataclass(frozen=True)
class RankingLoss:
    """What a loss of this module is: `state` says what it remembers, `step` is one batch."""

    ranges: ClassVar[dict[str, str]] = {}
    """The interval of each option that is a number; the others are True or False, or check themselves."""
    both: ClassVar[bool] = True
    """Whether a batch needs both classes."""

    def __post_init__(self) -> None:
        for option in fields(self):
            if option.name in self.ranges:
                check_number(self, option.name, self.ranges[option.name])
            elif isinstance(option.default, bool):
                check_flag(self, option.name)

    def state(self, rows: int) -> State:
        """What the loss remembers before the first batch: scalars, and tensors [rows] with one entry a training row."""
        return {}

    def scores(self, logits: Tensor) -> Tensor:
        """h, of logits in any shape."""
        return logits

    def step(self, pos: Tensor, neg: Tensor, state: State) -> tuple[Tensor, State]:
        """The loss of positives' scores [P] and negatives' [N], and the next state; [rows] are the positives' [P]."""
        raise NotImplementedError


@dataclass(frozen=True)
class BCE(RankingLoss):
    """Binary cross-entropy of the logits, `mean -w y log h - (1 - y) log(1 - h)`: no ranking, the baseline."""

    pos_weight: float = 1.0
    """w, of positives; the number of negatives over that of positives balances them."""
    ranges: ClassVar[dict[str, str]] = {"pos_weight": "(0, inf)"}
    both: ClassVar[bool] = False

    def step(self, pos: Tensor, neg: Tensor, state: State) -> tuple[Tensor, State]:
        """Without state."""
        count = max(1, len(pos) + len(neg))  # no row is a zero loss
        return (self.pos_weight * F.softplus(-pos).sum() + F.softplus(neg).sum()) / count, state


@dataclass(frozen=True)
class Bounded(RankingLoss):
    """Losses of scores in [0, 1] that ask for a margin."""

    margin: float = 1.0
    """m: how far a positive should be above a negative."""
    sigmoid: bool = True
    """h = sigmoid(logit); else h is the logit."""
    ranges: ClassVar[dict[str, str]] = {"margin": "(0, inf)"}

    def scores(self, logits: Tensor) -> Tensor:
        """Probabilities, or the logits."""
        return logits.sigmoid() if self.sigmoid else logits


@dataclass(frozen=True)
class AUCM(Bounded):
    """AUC margin, min over a, b and max over alpha >= 0 of the below; a, b, alpha are the state.

        E_i (h_i - a)^2 + E_j (h_j - b)^2 + 2 alpha (m + E_j h_j - E_i h_i) - alpha^2

    After a batch, `a <- (1 - gamma) a + gamma E_i h_i`, b likewise, `alpha <- (1 - gamma) alpha + gamma (m + b - a)`,
    at least 0. Source: Yuan et al., ICCV 2021, arXiv:2012.03173; the updates are PESG's, plain, of learning rate
    gamma / 2.
    """

    gamma: float = 0.2
    ranges: ClassVar[dict[str, str]] = Bounded.ranges | {"gamma": "(0, 1]"}

    def state(self, rows: int) -> State:
        """Three scalars."""
        return {"a": torch.zeros(()), "b": torch.zeros(()), "alpha": torch.zeros(())}

    def step(self, pos: Tensor, neg: Tensor, state: State) -> tuple[Tensor, State]:
        """The loss at the old state."""
        a, b, alpha = state["a"], state["b"], state["alpha"]
        gap = self.margin + neg.mean() - pos.mean()
        loss = (pos - a).square().mean() + (neg - b).square().mean() + 2 * alpha * gap - alpha**2
        a, b = a.lerp(pos.detach().mean().to(a), self.gamma), b.lerp(neg.detach().mean().to(b), self.gamma)
        return loss, {"a": a, "b": b, "alpha": alpha.lerp(self.margin + b - a, self.gamma).clamp(min=0)}


@dataclass(frozen=True)
class Pairwise(Bounded):
    """Losses of pairs."""

    surrogate: str = "squared_hinge"
    """Loss of a pair: 'squared_hinge', 'hinge', 'squared' or 'logistic' (there the margin is a scale)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.surrogate not in SURROGATES:
            raise ValueError(f"surrogate is {self.surrogate!r}: choose one of {', '.join(SURROGATES)}")

    def pairs(self, pos: Tensor, other: Tensor) -> Tensor:
        """l [P, N]."""
        return SURROGATES[self.surrogate](self.margin, pos[:, None] - other[None, :])


@dataclass(frozen=True)
class PAUCCVaR(Pairwise):
    """One-way partial AUC over FPR <= beta, exactly: the mean over the largest share beta of each positive's l_ij.

        p_ij = 1[l_ij > s_i] / beta,  then  s_i <- s_i - eta (1 - E_j 1[l_ij > s_i] / beta)

    Source: SOPA of Zhu et al., ICML 2022, arXiv:2203.00176.
    """

    beta: float = 0.2
    eta: float = 0.1
    ranges: ClassVar[dict[str, str]] = Pairwise.ranges | {"beta": "(0, 1]", "eta": "(0, inf)"}

    def state(self, rows: int) -> State:
        """s, the threshold of a positive."""
        return {"s": torch.zeros(rows)}

    def step(self, pos: Tensor, neg: Tensor, state: State) -> tuple[Tensor, State]:
        """The loss at the old thresholds."""
        losses = self.pairs(pos, neg)
        over = (losses.detach() > state["s"][:, None]).to(losses.dtype)
        return (over * losses).mean() / self.beta, {"s": state["s"] - self.eta * (1 - over.mean(1) / self.beta)}


@dataclass(frozen=True)
class PAUCDRO(Pairwise):
    """One-way partial AUC, soft: a small lambda looks at the largest l_ij of a positive, a large one at all.

        u_i <- (1 - gamma) u_i + gamma E_j exp(l_ij / lambda),  p_ij = exp(l_ij / lambda) / u_i

    Source: SOPA-s of Zhu et al., ICML 2022, arXiv:2203.00176.
    """

    lam: float = 1.0
    gamma: float = 0.9
    first_touch: bool = False
    ranges: ClassVar[dict[str, str]] = Pairwise.ranges | {"lam": "(0, inf)", "gamma": "(0, 1]"}

    def state(self, rows: int) -> State:
        """log u of a positive."""
        return {"log_u": torch.full((rows,), -torch.inf)}

    def step(self, pos: Tensor, neg: Tensor, state: State) -> tuple[Tensor, State]:
        """State first, then the loss."""
        losses = self.pairs(pos, neg)
        tilted = losses.detach() / self.lam
        log_u = moved(state["log_u"], logmeanexp(tilted), self.gamma, self.first_touch)
        return ((tilted - log_u[:, None]).exp() * losses).mean(), {"log_u": log_u}


@dataclass(frozen=True)
class TPAUCKL(PAUCDRO):
    """Two-way partial AUC: high TPR at low FPR; `tau log E_i (E_j exp(l_ij / lambda))^(lambda / tau)`.

        w <- (1 - gamma_w) w + gamma_w E_i u_i^(lambda / tau),  p_ij = u_i^(lambda / tau - 1) exp(l_ij / lambda) / w

    with u as in pAUC-DRO; a small tau looks at the hardest positives. Source: SOTA-s of Zhu et al., ICML 2022,
    arXiv:2203.00176; the loss of DACTYL's detectors (arXiv:2508.00619).
    """

    tau: float = 1.0
    gamma_w: float = 0.9
    ranges: ClassVar[dict[str, str]] = PAUCDRO.ranges | {"tau": "(0, inf)", "gamma_w": "(0, 1]"}

    def state(self, rows: int) -> State:
        """log u of a positive, and log w."""
        return {**super().state(rows), "log_w": torch.tensor(-torch.inf)}

    def step(self, pos: Tensor, neg: Tensor, state: State) -> tuple[Tensor, State]:
        """State first, then the loss."""
        losses, power = self.pairs(pos, neg), self.lam / self.tau
        tilted = losses.detach() / self.lam
        log_u = moved(state["log_u"], logmeanexp(tilted), self.gamma, self.first_touch)
        log_w = moved(state["log_w"], logmeanexp(power * log_u), self.gamma_w, self.first_touch)
        weights = ((tilted - log_u[:, None]) + (power * log_u - log_w)[:, None]).exp()  # in this order nothing cancels
        return (weights * losses).mean(), {"log_u": log_u, "log_w": log_w}


@dataclass(frozen=True)
class AP(Pairwise):
    """Average precision: u_i, v_i are averages of E_j l_ij over all of a batch and, v, over its positives alone.

        p_ij = (v_i - u_i 1[y_j = 1]) / u_i^2

    The value of a batch that repeats is 0 while its gradient is not: it is no measure of progress, log the AP itself.
    Source: SOAP of Qi et al., NeurIPS 2021, arXiv:2104.08736.
    """

    gamma: float = 0.9
    ranges: ClassVar[dict[str, str]] = Pairwise.ranges | {"gamma": "(0, 1]"}

    def state(self, rows: int) -> State:
        """u and v of a positive."""
        return {"u": torch.zeros(rows), "v": torch.zeros(rows)}

    def step(self, pos: Tensor, neg: Tensor, state: State) -> tuple[Tensor, State]:
        """State first, then the loss."""
        losses = self.pairs(pos, torch.cat([pos, neg]))
        positive = torch.arange(losses.shape[1], device=losses.device) < len(pos)
        fixed = losses.detach()
        u = state["u"].lerp(fixed.mean(1).to(state["u"]), self.gamma)  # never 0: l_ii is the surrogate of t = 0
        v = state["v"].lerp((fixed * positive).mean(1).to(state["v"]), self.gamma)
        weights = ((v / u)[:, None] - positive.to(u.dtype)) / u[:, None]  # not over u^2, which overflows sooner
        return (weights * losses).mean(), {"u": u, "v": v}


def logmeanexp(values: Tensor) -> Tensor:
    """log mean exp over the last dimension."""
    return values.logsumexp(-1) - math.log(values.shape[-1])


def moved(log_old: Tensor, log_new: Tensor, gamma: float, first_touch: bool = False) -> Tensor:
    """log((1 - gamma) old + gamma new) of logarithms; with `first_touch`, new itself where old is 0."""
    keep = math.log1p(-gamma) if gamma < 1 else -math.inf
    mixed = torch.logaddexp(log_old + keep, log_new + math.log(gamma))
    return torch.where(log_old == -torch.inf, log_new, mixed) if first_touch else mixed

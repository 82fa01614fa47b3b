"""EISL: matches n-grams of the target wherever they occur in the output; robust to shifted, repeated, dropped words.

    loss = sum_n w_n mean_j -sum_i G_ij S_ij          S_ij = 1/n sum_{k<n} log p_{i+k}(y_{j+k})

i and j run over output and target positions, G is the softmax of S over i (Gumbel-softmax with `gumbel`),
differentiated too. n = T is cross-entropy, if nothing is below the floor. Sequences are runs of labels: no n-gram
contains padding or masked text. The loss of a run is spread over its tokens, token t = j + k taking its share of
log p_{i+k}(y_t) times T / (T - n + 1): a token mean then weighs runs by length, as cross-entropy does (the authors
average over sequences).

Source: Liu et al. 2022, Don't Take It Literally: An Edit-Invariant Sequence Loss for Text Generation, arXiv:2106.15078,
with the floor of the authors' code, github.com/guangyliu/EISL; masking and spreading are this project's.
Statistics: lse, and target with ce_factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..options.ranges import check_flag, check_number, is_integer, is_number
from .sequence import SequenceLoss


@dataclass(frozen=True)
class EISL(SequenceLoss):
    """`ngram_factor sum_n w_n EISL_n + ce_factor CE`; hidden [B, T, D] and labels [B, T], or one sequence.

    Raises:
        ValueError: A field is out of its range, or the number of weights is not that of ngrams.
    """

    ngrams: tuple[int, ...] = (1, 2)
    """Lengths n; 0 is T, -1 is T - 1, ...; those that do not fit a run are dropped; if none fits, n = T is used."""
    weights: tuple[float, ...] | None = None
    """One positive weight per n (default: equal, sum 1); the weight of a dropped n goes to the others in proportion."""
    ngram_factor: float = 1.0
    """Weight of the n-gram loss."""
    gumbel: bool = False
    """Draw G by Gumbel-softmax from torch's global generator, as the paper does; else G is the plain softmax."""
    floor: float = -20.0
    """Lower bound of the log-probabilities; those below it have no gradient."""

    def __post_init__(self) -> None:
        if not isinstance(self.ngrams, Sequence) or not all(is_integer(n) for n in self.ngrams):
            raise ValueError(f"ngrams is {self.ngrams!r}: pass integers such as (1, 2), or (1,) for one length")
        object.__setattr__(self, "ngrams", tuple(self.ngrams))  # a list is not hashable
        if self.weights is not None:
            weights = self.weights if isinstance(self.weights, Sequence) else ()
            if len(weights) != len(self.ngrams) or not all(is_number(w, "(0, inf)") for w in weights):
                raise ValueError(
                    f"weights is {self.weights!r}: pass one positive number for each of ngrams, {self.ngrams}"
                )
            object.__setattr__(self, "weights", tuple(weights))
        check_number(self, "ngram_factor", "[0, inf)", "choose a finite number >= 0")
        check_number(self, "floor", "[-inf, 0)", "choose a negative number of nats, -inf for none")
        check_flag(self, "gumbel")
        super().__post_init__()

    def of_run(self, logp: Tensor) -> Tensor:
        """The n-gram part [T] of one run, from log p_i(y_j) [T, T]."""
        count, logp, loss = len(logp), logp.clamp(min=self.floor), torch.zeros_like(logp[0])
        for n, weight in self.sizes(count).items():
            size = count - n + 1
            windows = [logp[k : k + size, k : k + size] for k in range(n)]
            scores = sum(windows[1:], windows[0]) / n
            match = F.gumbel_softmax(scores, dim=0) if self.gumbel else scores.softmax(0)
            credit = sum(F.pad((match * window).sum(0), (k, n - 1 - k)) for k, window in enumerate(windows))
            loss = loss - self.ngram_factor * weight * count / (size * n) * credit
        return loss

    def sizes(self, count: int) -> dict[int, float]:
        """n-gram length -> weight, in a run of `count` tokens."""
        weights: dict[int, float] = {}
        for n, weight in zip(self.ngrams, self.weights or (1.0,) * len(self.ngrams), strict=True):
            size = n if n > 0 else count + n
            if 0 < size <= count:
                weights[size] = weights.get(size, 0.0) + weight
        weights = weights or {count: 1.0}
        share = (sum(self.weights) if self.weights else 1.0) / sum(weights.values())
        return {n: weight * share for n, weight in weights.items()}

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """One run [T, V]: the scores as a convolution with an identity kernel, spread by its adjoint."""
        logp = logits.log_softmax(-1)[:, labels]
        loss, logp = -self.ce_factor * logp.diagonal(), torch.relu(logp - self.floor) + self.floor
        for n, weight in self.sizes(len(labels)).items():
            kernel = torch.eye(n).to(logp)[None, None] / n
            scores = F.conv2d(logp[None, None], kernel)
            spread = F.conv_transpose2d(scores.softmax(-2), kernel)[0, 0]
            loss = loss - self.ngram_factor * weight * len(labels) / scores.shape[-1] * (spread * logp).sum(0)
        return loss

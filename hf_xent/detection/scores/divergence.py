"""DC-PDD: how far the model's probabilities are from the frequencies of tokens in a corpus.

The cap a = 0.01 is its authors' default, and the score depends on it more than on anything else: never choose it on the
labels that evaluate the score.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops import Stats
from .base import Range, mean, score

CAP = Range("(0, inf]", "a number above 0")


@score(higher_is="positive", a=CAP)
def dc_pdd(stats: Stats, frequencies: Tensor, a: float = 0.01) -> Tensor:
    """Divergence from the frequencies q [V] of tokens in a corpus, each term capped at a.

        mean_{i first of its token} min(-p_i ln q(x_i), a)          q(v) = (count(v) + 1) / (N' + V)

    Source: Zhang et al. 2024, DC-PDD, arXiv:2409.14781.
    """
    CAP.check("a", a)
    first = first_occurrences(stats.labels, stats.mask)
    q = frequencies[torch.where(stats.mask, stats.labels, 0)]
    return mean((-stats.logp.double().exp() * q.log()).clamp(max=a), first)


def first_occurrences(labels: Tensor, mask: Tensor) -> Tensor:
    """Where a text has a token for the first time, [B, T]."""
    ranked, order = torch.where(mask, labels, -1).sort(dim=-1, stable=True)  # equal tokens keep their order
    is_first = torch.ones_like(mask)
    is_first[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    return torch.zeros_like(mask).scatter(-1, order, is_first) & mask

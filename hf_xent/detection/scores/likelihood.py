"""The likelihood of a text: models assign more probability to texts they were trained on, and to texts of models."""

from __future__ import annotations

from torch import Tensor

from ...ops import Stats
from .base import mean, score


@score(higher_is="negative")
def loss(stats: Stats) -> Tensor:
    """Mean negative log-probability of the tokens, nats.

        mean_i -logp_i

    Source: Yeom et al. 2018, arXiv:1709.01604.
    """
    return mean(stats.nll, stats.mask)


@score(higher_is="negative")
def perplexity(stats: Stats) -> Tensor:
    """Exponential of the loss, which ranks texts as `loss` does.

        exp(loss)

    Source: Carlini et al. 2021, arXiv:2012.07805.
    """
    return loss(stats).exp()

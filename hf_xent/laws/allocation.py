"""How to spend compute and parameters: what has the least loss under a law, in closed form.

    N = G (C / k)^(beta / (alpha + beta))    D = (C / k)^(alpha / (alpha + beta)) / G

G = (alpha A / (beta B))^(1 / (alpha + beta)), C is the compute in FLOPs, and k N D those of training, with k = 6.

The encoder's best share of an encoder-decoder's parameters is pe / (pe + pd).

Source: Hoffmann et al. 2022, arXiv:2203.15556, eq. 4; Ghorbani et al. 2021, arXiv:2109.07740.
"""

from __future__ import annotations

from typing import NamedTuple

from ..options.ranges import is_number
from .encoder_decoder import EncoderDecoder
from .parametric import ParametricLoss


class Allocation(NamedTuple):
    """A model's size and training tokens, with the loss that the law predicts for them in nats."""

    params: float
    tokens: float
    loss: float

    @property
    def tokens_per_param(self) -> float:
        """Tokens / params."""
        return self.tokens / self.params


def compute_optimal(law: ParametricLoss, compute: float, flops_per_token_and_param: float = 6.0) -> Allocation:
    """The size and tokens with the least loss at a compute.

    Args:
        law: The loss.
        compute: FLOPs of the training.
        flops_per_token_and_param: k of `compute = k N D`.

    Returns:
        The best allocation.

    Raises:
        ValueError: A number is not positive and finite.
    """
    _check_positive(compute=compute, flops_per_token_and_param=flops_per_token_and_param)
    total = law.alpha + law.beta
    ratio = (law.alpha * law.A / (law.beta * law.B)) ** (1 / total)
    product = compute / flops_per_token_and_param
    params, tokens = ratio * product ** (law.beta / total), product ** (law.alpha / total) / ratio
    return Allocation(params, tokens, float(law.predict(params=params, tokens=tokens)))


class Split(NamedTuple):
    """The parameters of an encoder and a decoder, with the loss that the law predicts for them in nats."""

    encoder: float
    decoder: float
    loss: float


def optimal_split(law: EncoderDecoder, params: float) -> Split:
    """The encoder and decoder with the least loss at a number of parameters of both together.

    Args:
        law: The loss.
        params: Parameters of encoder and decoder.

    Returns:
        The best split.

    Raises:
        ValueError: The number is not positive and finite.
    """
    _check_positive(params=params)
    encoder = law.encoder_share * params
    decoder = params - encoder
    return Split(encoder, decoder, float(law.predict(encoder=encoder, decoder=decoder)))


def _check_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not is_number(value, "(0, inf)"):
            raise ValueError(f"{name} is {value!r}: choose a finite number > 0")

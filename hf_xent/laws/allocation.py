"""How to spend compute: the best size and tokens under the parametric loss, in closed form.

    N = G (C / k)^(beta / (alpha + beta))    D = (C / k)^(alpha / (alpha + beta)) / G

G = (alpha A / (beta B))^(1 / (alpha + beta)), C is the compute in FLOPs, and k N D those of training, with k = 6.

Source: Hoffmann et al. 2022, arXiv:2203.15556, eq. 4.
"""

from __future__ import annotations

from typing import NamedTuple

from ..options.ranges import is_number
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
    for name, value in (("compute", compute), ("flops_per_token_and_param", flops_per_token_and_param)):
        if not is_number(value, "(0, inf)"):
            raise ValueError(f"{name} is {value!r}: choose a finite number > 0")
    total = law.alpha + law.beta
    ratio = (law.alpha * law.A / (law.beta * law.B)) ** (1 / total)
    product = compute / flops_per_token_and_param
    params, tokens = ratio * product ** (law.beta / total), product ** (law.alpha / total) / ratio
    return Allocation(params, tokens, float(law.predict(params=params, tokens=tokens)))

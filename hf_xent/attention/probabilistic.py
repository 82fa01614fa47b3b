"""Blocks of keys that take part with a probability that falls with their distance.

block pair (I, J), J <= I, of b queries and b keys is kept with probability pi(I - J),  pi(0) = pi(1) = 1
geometric: pi(d) = rate^(d-1)        inverse: pi(d) = 1 / d
unbiased: kept scores get -log pi, so that E[sum of kept exp(score)] = the sum of all, before the softmax divides

Only the sums are unbiased: their ratio, the attention's output, is not. Without it, what is far gets less weight. With
`first`, pi(I) = 1 for the first block too (not of the source): models often put weight there that is meant for nothing.

Source: Li 2024, arXiv:2410.18441 ("probabilistic FlashAttention"), which reports no measurement; the probabilities
    and the unbiased variant are our reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from .base import AttentionBias, Entries

Fall = Literal["geometric", "inverse"]


@dataclass(frozen=True)
class Probabilistic(AttentionBias):
    """Blocks that are drawn once from the seed, so that steps with a cache see the same blocks as one forward.

    Blocks are counted from a row's first token that is no padding. Another seed is another draw.

    Args:
        block: The number of tokens in a block.
        fall: How the probability falls with the distance of blocks, 'geometric' or 'inverse'.
        rate: The ratio of the geometric series, above 0 and at most 1, which keeps everything.
        unbiased: Whether kept scores get -log pi.
        first: Whether the first block, J = 0, is always kept.
        per_head: Whether each head has a draw of its own.
        per_layer: Whether each layer has; a mask a layer is then in memory.
        seed: Of the draw.

    Raises:
        ValueError: An option is out of its range.
    """

    block: int = 64
    fall: Fall = "geometric"
    rate: float = 0.5
    unbiased: bool = False
    first: bool = False
    per_head: bool = False
    per_layer: bool = False
    seed: int = 0
    drops: ClassVar[bool] = True
    from_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block is {self.block}: a block has at least 1 token")
        if self.fall not in get_args(Fall):
            raise ValueError(f"fall is {self.fall!r}: choose one of {', '.join(get_args(Fall))}")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate is {self.rate}: it is above 0 and at most 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}: it is at least 0")

    def planes(self, heads: int) -> int:
        """One for each draw."""
        return heads if self.per_head else 1

    def probabilities(self, blocks: int) -> Tensor:
        """pi(0) .. pi(blocks - 1), float64 [blocks]."""
        distances = torch.arange(blocks, dtype=torch.float64)
        steps = (distances - 1).clamp(min=0)
        return self.rate**steps if self.fall == "geometric" else 1 / distances.clamp(min=1)

    def of_pairs(self, blocks: int) -> Tensor:
        """The probability of each block pair, float64 [blocks, blocks]; those above the diagonal are kept, too."""
        ids = torch.arange(blocks)
        pi = self.probabilities(blocks)[(ids[:, None] - ids).clamp(min=0)]
        if self.first:
            pi[:, 0] = 1
        return pi

    def share(self, length: int) -> float:
        """The expected share of causal pairs of tokens that take part."""
        blocks = torch.arange(length) // self.block
        kept = self.of_pairs(int(blocks[-1]) + 1)[blocks[:, None], blocks].tril()
        return float(kept.sum()) / (length * (length + 1) / 2)

    def drawn(self, blocks: int, planes: int) -> Tensor:
        """What is added to the scores of block pairs, float32 [planes, blocks, blocks]; -inf above the diagonal."""
        weights = torch.full((planes, blocks, blocks), -torch.inf)
        pi = self.of_pairs(blocks)
        for row in range(blocks):  # a generator a row: it does not matter how many rows there are
            draw = torch.from_numpy(np.random.default_rng((self.seed, row)).random((row + 1, planes)))
            of_row = pi[row, : row + 1, None]
            added = -of_row.log() if self.unbiased else torch.zeros_like(of_row)
            weights[:, row, : row + 1] = added.where(draw < of_row, -torch.inf).T.float()
        return weights

    def entries(self, length: int, planes: int, device: torch.device | str = "cpu") -> Entries:
        """See `AttentionBias`."""
        weights, block = self.drawn(-(-length // self.block), planes).to(device), self.block
        return lambda plane, queries, keys: weights[plane, queries // block, keys // block]


def probabilistic_mask(
    length: int, planes: int = 1, *, bias: Probabilistic | None = None, device: torch.device | str = "cpu"
) -> Tensor:  # [P, T, T]
    """An additive mask of a sequence, for `scaled_dot_product_attention`: causal, and by blocks.

    Args:
        length: The number of tokens T.
        planes: The number of draws P, such as the number of heads.
        bias: The options of the draw, by default those of `Probabilistic()`.
        device: Of the result.

    Returns:
        float32 [P, T, T]: 0, or -log pi if `bias` is unbiased, and -inf for pairs that take no part.
    """
    positions = torch.arange(length, device=device)
    mask = (Probabilistic() if bias is None else bias).dense(positions, positions, planes)
    return mask.masked_fill(positions[:, None] < positions, -torch.inf)

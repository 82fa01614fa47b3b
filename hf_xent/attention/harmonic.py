"""Scores that fall with the distance: by a harmonic number, or in proportion to it (ALiBi).

score(i, j) = rope(q_i, k_j) / sqrt(d) - m_h H(|i - j|),    H(n) = sum_{t <= n} 1 / t,  H(0) = 0

H(n) is about ln(n) + 0.5772, so a head's weights fall as a power of the distance, n^(-m_h), where ALiBi's fall
exponentially. The model's own scores, rotary or not, are left as they are.

Source: Li 2024, arXiv:2410.18441, which combines rotary positions and ALiBi by a harmonic series and reports no
    measurement; the formula is our reading. Linear: Press, Smith, Lewis 2022, arXiv:2108.12409 (ALiBi).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..options.ranges import is_number
from .base import AttentionBias, Entries

Slopes = float | Sequence[float] | None


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slopes: 2^(-8 h / n) for h = 1 .. n heads, n a power of two.

    For other numbers of heads they are those of the power of two below, and then every other one of the power above.

    Args:
        heads: The number of heads.

    Returns:
        A positive number a head.
    """
    below = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * h / below) for h in range(1, below + 1)]
    return slopes + [2 ** (-4 * h / below) for h in range(1, 2 * (heads - below), 2)]


def harmonic_numbers(length: int, device: torch.device | str = "cpu") -> Tensor:
    """H(0) .. H(length - 1), float32 [length]: 0, 1, 1.5, 1.8333 ..."""
    terms = torch.arange(length, dtype=torch.float64)
    terms[1:] = 1 / terms[1:]
    return terms.cumsum(0).float().to(device)


@dataclass(frozen=True)
class Linear(AttentionBias):
    """ALiBi: a head's scores fall in proportion to the distance, -m_h |i - j|.

    Args:
        slopes: A number for all heads, one for each head, or None for ALiBi's geometric series (`alibi_slopes`).

    Raises:
        ValueError: A slope is negative or not finite.
    """

    slopes: Slopes = None

    def __post_init__(self) -> None:
        given = self.slopes
        values = [] if given is None else list(given) if isinstance(given, Sequence) else [given]
        if not all(is_number(slope, "[0, inf)") for slope in values):
            raise ValueError(f"slopes is {given!r}: they are finite numbers of at least 0, subtracted from scores")
        if isinstance(given, Sequence):
            object.__setattr__(self, "slopes", tuple(map(float, given)))

    def planes(self, heads: int) -> int:
        """One a head."""
        self.of_heads(heads)
        return heads

    def of_heads(self, heads: int) -> list[float]:
        """A slope for each head. Raises: ValueError if the slopes are for another number of heads."""
        if self.slopes is None:
            return alibi_slopes(heads)
        if isinstance(self.slopes, int | float):
            return [float(self.slopes)] * heads
        if len(self.slopes) != heads:
            raise ValueError(f"slopes has {len(self.slopes)} numbers, but the model has {heads} heads: give one a head")
        return list(self.slopes)

    def table(self, length: int, device: torch.device | str) -> Tensor:
        """What the slopes are multiplied by, [length], from the distance 0."""
        return torch.arange(length, dtype=torch.float32, device=device)

    def entries(self, length: int, planes: int, device: torch.device | str = "cpu") -> Entries:
        """See `AttentionBias`."""
        table, slopes = self.table(length, device), torch.tensor(self.of_heads(planes), device=device)
        return lambda plane, queries, keys: table[(queries - keys).abs()] * -slopes[plane]


@dataclass(frozen=True)
class Harmonic(Linear):
    """A head's scores fall by the harmonic number of the distance, -m_h H(|i - j|); see the module.

    Args:
        slopes: A number for all heads, one for each head, or None for ALiBi's geometric series (`alibi_slopes`).

    Raises:
        ValueError: A slope is negative or not finite.
    """

    def table(self, length: int, device: torch.device | str) -> Tensor:
        """Harmonic numbers."""
        return harmonic_numbers(length, device)


def harmonic_bias(
    length_q: int, length_k: int, slopes: Sequence[float], device: torch.device | str = "cpu"
) -> Tensor:  # [H, Q, K]
    """What the harmonic series adds to the scores of each head, without a causal mask: -m_h H(|i - j|).

    Args:
        length_q: The number of queries, which are the last ones of the keys' positions.
        length_k: The number of keys.
        slopes: One number a head.
        device: Of the result.

    Returns:
        float32 [H, Q, K].

    Raises:
        ValueError: There are more queries than keys, or a slope is negative.
    """
    if length_q > length_k:
        raise ValueError(
            f"length_q is {length_q}, more than length_k, {length_k}: the queries are the last of the keys"
        )
    keys = torch.arange(length_k, device=device)
    return Harmonic(tuple(slopes)).dense(keys[length_k - length_q :], keys, len(slopes))


def harmonic_score_mod(
    slopes: Sequence[float], length: int, offset: int = 0, device: torch.device | str = "cpu"
) -> Callable[..., Tensor]:
    """The harmonic series as `score_mod` of `torch.nn.attention.flex_attention`.

    Args:
        slopes: One number a head.
        length: The number of keys.
        offset: The position of the first query, if keys are cached before it.
        device: Of queries and keys.

    Returns:
        A function (score, batch, head, query, key) -> score.

    Raises:
        ValueError: A slope is negative or not finite.
    """
    entries = Harmonic(tuple(slopes)).entries(length, len(slopes), device)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + entries(head, query + offset, key)

    return score_mod

"""A sliding window over the latest keys, the control of biases that reach further.

With `first`, the first tokens of a text are kept, too, since models often put weight on them that is meant for nothing.

Source: Xiao et al. 2024, arXiv:2309.17453, for the first tokens ("attention sinks").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import AttentionBias, Entries


@dataclass(frozen=True)
class Window(AttentionBias):
    """Each query attends to itself and the `size - 1` keys before it, in every layer and head.

    Args:
        size: How many keys, at least 1.
        first: How many tokens at the start of the text every later query attends to as well.

    Raises:
        ValueError: The size is below 1, or `first` is negative.
    """

    size: int
    first: int = 0
    drops: ClassVar[bool] = True
    from_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}: a window has at least 1 key, the query's own")
        if self.first < 0:
            raise ValueError(f"first is {self.first}: it is a number of tokens, at least 0")

    def planes(self, heads: int) -> int:
        """One for all."""
        return 1

    def share(self, length: int) -> float:
        """The share of causal pairs of tokens that take part."""
        ends = torch.arange(1, length + 1, dtype=torch.float64)
        kept = torch.minimum(ends, self.size + (ends - self.size).clamp(0, self.first))
        return float(kept.sum() / ends.sum())

    def entries(self, length: int, planes: int, device: torch.device | str = "cpu") -> Entries:
        """See `AttentionBias`."""
        near, first = torch.zeros(length, device=device), torch.full((length,), -torch.inf, device=device)
        near[self.size :], first[: self.first] = -torch.inf, 0.0
        return lambda plane, queries, keys: torch.maximum(near[(queries - keys).abs()], first[keys])

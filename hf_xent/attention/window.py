"""A sliding window over the latest keys, the control of biases that reach further."""

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

    Raises:
        ValueError: The size is below 1.
    """

    size: int
    drops: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}: a window has at least 1 key, the query's own")

    def planes(self, heads: int) -> int:
        """One for all."""
        return 1

    def entries(self, length: int, planes: int, device: torch.device | str = "cpu") -> Entries:
        """See `AttentionBias`."""
        table = torch.zeros(length, device=device)
        table[self.size :] = -torch.inf
        return lambda plane, queries, keys: table[(queries - keys).abs()]

"""What a bias of attention is: one number for each pair of a query and a key, added to their score.

score(i, j) = q_i . k_j / sqrt(d) + b(plane, i, j),    b = -inf: the pair does not take part

A plane is what pairs share: all layers and heads have the same numbers, or each head or layer has its own. One formula
of indices serves dense masks, where the indices broadcast, and FlexAttention, where they are scalars.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

Entries = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(planes, queries, keys), index tensors that broadcast -> the numbers that are added to scores, float32."""


class AttentionBias(ABC):
    """A bias of attention scores that depends on where the query and the key are, and on nothing else."""

    drops: ClassVar[bool] = False
    """Whether pairs may be left out (`-inf`)."""
    from_start: ClassVar[bool] = False
    """Whether entries depend on the positions themselves, not on the distance alone; padding on the left is no part."""

    per_layer: bool = False
    """Whether each layer has planes of its own; those of the first layer come first."""

    @abstractmethod
    def planes(self, heads: int) -> int:
        """How many planes a layer has: 1 for all heads, or one a head.

        Raises:
            ValueError: The bias was made for another number of heads.
        """

    @abstractmethod
    def entries(self, length: int, planes: int, device: torch.device | str = "cpu") -> Entries:
        """The formula, with its tables.

        Args:
            length: All positions are below it.
            planes: How many there are, of all layers.
            device: Of the tables.
        """

    def dense(self, queries: Tensor, keys: Tensor, planes: int, length: int | None = None) -> Tensor:
        """The entries of all planes.

        Args:
            queries: Positions, [B, Q] or [Q].
            keys: Positions, [B, K] or [K].
            planes: How many there are, of all layers.
            length: All positions are below it; by default it is read from them.

        Returns:
            [B, planes, Q, K], or [planes, Q, K] for positions without rows; float32.
        """
        length = 1 + int(max(queries.max(), keys.max())) if length is None else length
        entries = self.entries(length, planes, queries.device)
        plane = torch.arange(planes, device=queries.device)[:, None, None]
        found = entries(plane, queries[..., None, :, None], keys[..., None, None, :])
        return found.expand(*queries.shape[:-1], planes, queries.shape[-1], keys.shape[-1])

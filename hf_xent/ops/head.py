"""An output head: the product that makes logits of hidden states, and all that transformers' causal LMs do after it.

    z[t,j] = softcap * tanh(scale * (h_t . W_j + b_j) / softcap)          no tanh without a softcap

Shapes: N tokens, D hidden, V vocabulary, R rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .shard import Shard, copy_to_ranks, gather_from_ranks, sum_ranks
from .statistics import wide


@dataclass(frozen=True, eq=False)
class Head:
    """An output head: `z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`; no tanh if `softcap` is None.

    Every post-head operation of transformers' causal LMs is of this form, so a head describes them all. With an
    `adapter`, hidden has R more features and the matrix is [weight | adapter]: two pieces, since one may be frozen.

    Args:
        weight: The matrix [V, D].
        bias: One number a token, [V].
        scale: The factor of the raw product.
        softcap: The bound of the logits' absolute value; None for no bound.
        adapter: More columns of the matrix [V, R], for the last R features of hidden.
        shard: Which part of a larger vocabulary weight, bias and adapter are; None if they are all of it.
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None
    adapter: Tensor | None = None  # [V, R], for the last R features of hidden
    shard: Shard | None = None

    @property
    def size(self) -> int:
        """The number of tokens here, V."""
        return self.weight.shape[0]

    @property
    def vocabulary(self) -> int:
        """The number of tokens in the whole vocabulary, on all ranks."""
        return self.size if self.shard is None else self.shard.size

    @property
    def features(self) -> int:
        """The hidden size it takes, D + R."""
        return self.weight.shape[1] + (0 if self.adapter is None else self.adapter.shape[1])

    @property
    def matrices(self) -> dict[str, tuple[Tensor, slice]]:
        """Its matrices by the name of their field, with the features of hidden that each multiplies."""
        width = self.weight.shape[1]
        matrices = {"weight": (self.weight, slice(0, width))}
        if self.adapter is not None:
            matrices["adapter"] = (self.adapter, slice(width, None))
        return matrices

    def __getitem__(self, tokens: slice | Tensor) -> Head:
        """The same head over some tokens.

        Args:
            tokens: A slice of those here, which copies nothing, or ids of the whole vocabulary, whose rows are put
                together from all ranks and are whole on each.
        """
        shard = self.shard
        if shard is None or isinstance(tokens, slice):
            return self._each(lambda x: x[tokens])
        columns = tokens - shard.start
        here, columns = (columns >= 0) & (columns < self.size), columns.clamp(0, self.size - 1)

        def rows(x: Tensor) -> Tensor:
            mask = here.reshape(*here.shape, *[1] * (x.ndim - 1))
            return sum_ranks(torch.where(mask, x[columns], 0), shard)

        return replace(self._each(rows), shard=None)

    def detach(self) -> Head:
        """The same head without gradient."""
        return self._each(Tensor.detach)

    def to(self, dtype: torch.dtype) -> Head:
        """The same head in another dtype."""
        return self._each(lambda x: x.to(dtype))

    def tempered(self, temperature: float) -> Head:
        """The head whose logits are z / temperature."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return replace(self, scale=self.scale / temperature, softcap=softcap)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Head:
        """The same head with each of its tensors changed."""
        bias, adapter = (None if x is None else change(x) for x in (self.bias, self.adapter))
        return replace(self, weight=change(self.weight), bias=bias, adapter=adapter)

    def joined(self) -> Head:
        """The same head with one matrix, which is a copy if there is an adapter."""
        if self.adapter is None:
            return self
        return replace(self, weight=torch.cat([self.weight, self.adapter], 1), adapter=None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Dense logits, differentiable by autograd.

        Args:
            hidden: Hidden states [..., D + R], the same on every rank.

        Returns:
            [..., V] in the dtype of statistics, of the whole vocabulary also where the head is a shard of it.
        """
        hidden = copy_to_ranks(hidden, self.shard)
        raw = F.linear(hidden[..., : self.weight.shape[1]], self.weight, self.bias)
        if self.adapter is not None:
            raw = raw + F.linear(hidden[..., self.weight.shape[1] :], self.adapter)
        return self.activate(gather_from_ranks(raw.to(wide(hidden.dtype)), self.shard))

    def activate(self, raw: Tensor) -> Tensor:
        """Scale and softcap of the raw product; a new tensor unless there is nothing to do."""
        if self.softcap is None:
            return raw if self.scale == 1 else raw * self.scale
        return torch.tanh(raw * (self.scale / self.softcap)) * self.softcap

    def slope(self, z: Tensor) -> Tensor | float:
        """The derivative dz / d raw at the activated logit z."""
        return self.scale if self.softcap is None else self.scale * (1 - (z / self.softcap) ** 2)


Payload = tuple[Tensor, Head]
"""Hidden states [..., D2] and the head they go through: what a second model says of the same tokens, over the same V.

`vocab_stats(..., payload=...)` gives the expectation of its logits under the softmax of the first head.
"""

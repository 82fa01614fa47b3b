"""An output head: the product that turns hidden states into logits, and what transformers' causal LMs apply to it.

    z[t,j] = softcap * tanh(scale * (h_t . W_j + b_j) / softcap)          no tanh without a softcap

Shapes: N tokens, D hidden, V vocabulary, R rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .panels import Matrix, Scaled, linear
from .shard import Shard, copy_to_ranks, gather_from_ranks, sum_ranks
from .statistics import wide


@dataclass(frozen=True, eq=False)
class Head:
    """An output head: `z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`; no tanh if `softcap` is None.

    Every post-head operation of transformers' causal LMs is of this form, so a head describes them all. With an
    `adapter`, hidden has R more features and the matrix is [weight | adapter]: two tensors, since one may be frozen.

    Args:
        weight: The matrix [V, D].
        bias: One number per token of the vocabulary, [V].
        scale: The factor of the raw product.
        softcap: The bound of the logits' absolute value; None for no bound.
        adapter: More columns of the matrix [V, R], for the last R features of hidden.
        shard: The part of a larger vocabulary that weight, bias and adapter cover; None if they cover all of it.
        fp32: Whether 16-bit hidden states and matrices are multiplied and summed in float32. A panel of the matrix is
            converted at a time; gradients are summed in float32 and given in the tensors' own dtypes.
        gain: A factor for each token's row of weight [V], not of bias and adapter: gain_j (hidden . weight_j) + bias_j.
    """

    weight: Matrix  # [V, D]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None
    adapter: Tensor | None = None  # [V, R], for the last R features of hidden
    shard: Shard | None = None
    fp32: bool = False
    gain: Tensor | None = None  # [V]

    @property
    def size(self) -> int:
        """The number of tokens on this rank, V."""
        return self.weight.shape[0]

    @property
    def vocabulary(self) -> int:
        """The number of tokens in the whole vocabulary, on all ranks."""
        return self.size if self.shard is None else self.shard.size

    @property
    def features(self) -> int:
        """The hidden size that it expects, D + R."""
        return self.weight.shape[1] + (0 if self.adapter is None else self.adapter.shape[1])

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """What a gradient can flow to, by field name; None for a weight that is not a tensor."""
        weight = self.weight if isinstance(self.weight, Tensor) else None
        return {"weight": weight, "bias": self.bias, "adapter": self.adapter, "gain": self.gain}

    def with_tensors(
        self, weight: Tensor | None, bias: Tensor | None, adapter: Tensor | None, gain: Tensor | None
    ) -> Head:
        """The same head over other tensors; a weight that is not a tensor stays."""
        kept: Any = weight if isinstance(self.weight, Tensor | None) else self.weight
        return replace(self, weight=kept, bias=bias, adapter=adapter, gain=gain)

    @property
    def matrices(self) -> dict[str, tuple[Matrix | Scaled, slice]]:
        """Its matrices by field name, each with the slice of hidden's features that it multiplies."""
        width = self.weight.shape[1]
        weight = self.weight if self.gain is None else Scaled(self.weight, self.gain)
        matrices: dict[str, tuple[Matrix | Scaled, slice]] = {"weight": (weight, slice(0, width))}
        if self.adapter is not None:
            matrices["adapter"] = (self.adapter, slice(width, None))
        return matrices

    def __getitem__(self, tokens: slice | Tensor) -> Head:
        """The same head over some tokens.

        Args:
            tokens: A slice of this rank's tokens, which copies nothing; or ids of the whole vocabulary, whose rows are
                gathered from all ranks, so that every rank has all of them.
        """
        shard = self.shard
        if shard is None or isinstance(tokens, slice):
            return self._map(lambda x: x[tokens])
        columns = tokens - shard.start
        on_this_rank, columns = (columns >= 0) & (columns < self.size), columns.clamp(0, self.size - 1)

        def rows(x: Tensor) -> Tensor:
            mask = on_this_rank.reshape(*columns.shape, *[1] * (x.ndim - 1))
            return sum_ranks(torch.where(mask, x[columns], 0), shard)

        return replace(self._map(rows), shard=None)

    def detach(self) -> Head:
        """The same head without gradient."""
        return self._map(lambda x: x.detach())

    def to(self, dtype: torch.dtype) -> Head:
        """The same head in another dtype."""
        return self._map(lambda x: x.to(dtype))

    def tempered(self, temperature: float) -> Head:
        """The head whose logits are z / temperature."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return replace(self, scale=self.scale / temperature, softcap=softcap)

    def dtype_for(self, hidden: torch.dtype) -> torch.dtype:
        """The dtype in which it multiplies hidden states of a dtype."""
        return wide(torch.promote_types(hidden, self.weight.dtype)) if self.fp32 else hidden

    @property
    def by_panels(self) -> bool:
        """Whether its matrices are not multiplied as they are stored."""
        return self.fp32 or self.gain is not None or not isinstance(self.weight, Tensor)

    def _map(self, change: Callable[[Any], Any]) -> Head:
        """The same head with each of its tensors changed."""
        bias, adapter, gain = (None if x is None else change(x) for x in (self.bias, self.adapter, self.gain))
        return replace(self, weight=change(self.weight), bias=bias, adapter=adapter, gain=gain)

    def joined(self) -> Head:
        """The same head with one matrix, which is a copy if there is an adapter or a gain."""
        if self.adapter is None and self.gain is None:
            return self
        weight = self.weight if isinstance(self.weight, Tensor) else self.weight.rows(slice(None))
        if self.gain is not None:
            weight = (weight * self.gain[:, None]).to(self.dtype_for(weight.dtype))
        if self.adapter is not None:
            weight = torch.cat([weight, self.adapter], 1)
        return replace(self, weight=weight, adapter=None, gain=None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Dense logits, differentiable by autograd.

        Args:
            hidden: Hidden states [..., D + R], the same on every rank.

        Returns:
            Logits [..., V] in the dtype of statistics, over the whole vocabulary even if the head is a shard of it.
        """
        hidden = copy_to_ranks(hidden.to(self.dtype_for(hidden.dtype)), self.shard)
        product: Callable[..., Tensor] = linear if self.by_panels else F.linear
        raw = product(hidden[..., : self.weight.shape[1]], self.weight, self.bias if self.gain is None else None)
        if self.gain is not None:
            raw = raw.to(wide(raw.dtype)) * self.gain
            raw = raw if self.bias is None else raw + self.bias
        if self.adapter is not None:
            raw = raw + product(hidden[..., self.weight.shape[1] :], self.adapter)
        return self.activate(gather_from_ranks(raw.to(wide(hidden.dtype)), self.shard))

    def logit_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """The logit of one token in each row.

        Args:
            hidden: Hidden states [N, D + R].
            tokens: Ids of the whole vocabulary [N].

        Returns:
            Logits [N] in the dtype of statistics.
        """
        rows: Any = self[tokens].joined()
        dtype = wide(hidden.dtype)
        raw = torch.linalg.vecdot(rows.weight.to(dtype), hidden.to(dtype))
        return self.activate(raw if rows.bias is None else raw + rows.bias)

    def activate(self, raw: Tensor) -> Tensor:
        """Scale and softcap applied to the raw product; a new tensor unless there is nothing to do."""
        if self.softcap is None:
            return raw if self.scale == 1 else raw * self.scale
        return torch.tanh(raw * (self.scale / self.softcap)) * self.softcap

    def slope(self, z: Tensor) -> Tensor | float:
        """The derivative dz / d raw at the activated logit z."""
        return self.scale if self.softcap is None else self.scale * (1 - (z / self.softcap) ** 2)


Payload = tuple[Tensor, Head]
"""Hidden states [..., D2] and their head: logits, not computed, of a second model over the same tokens and vocabulary.

`vocab_stats(..., payload=...)` returns the expectation of these logits under the softmax of the first head.
"""

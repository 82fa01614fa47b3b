"""How a bias gets to a model's layers: in the place of the mask that transformers makes for them.

transformers makes a mask a forward (one a type of layer), through a registry, and knows there where the queries and the
keys are: behind a cache, in a window, beside padding, among packed sequences. The bias becomes a part of that mask,
[B, planes, Q, K], and each layer takes its planes of it. FlexAttention has its own kind of mask, which carries the
bias as an attribute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .base import AttentionBias, Entries


def positions(length: int, offset: Any, padding: Tensor | None, device: Any) -> Tensor:
    """Positions from an offset on, [length]; counted from the end of each row's padding on the left, [B, length]."""
    found = torch.arange(length, device=device) + offset
    return found if padding is None else (found - padding[:, None]).clamp(min=0)


def left_padding(bias: AttentionBias, attention_mask: Tensor | None) -> Tensor | None:
    """How many tokens at the start of each row are padding, [B], if the bias has to know it."""
    if not bias.from_start or attention_mask is None:
        return None
    return (attention_mask.cumsum(-1) == 0).sum(-1)


def dense_mask(
    bias: AttentionBias, planes: int, stock: Callable[..., Any], asked: dict[str, Any]
) -> Tensor:  # [B, P, Q, K]
    """The additive mask of eager attention and sdpa.

    What the model's own mask excludes gets the lowest finite number, as in transformers' masks of eager attention, so
    that a row without any key, such as one of padding, has an average and no NaN.

    Args:
        bias: The bias.
        planes: How many planes it has.
        stock: transformers' boolean mask of sdpa.
        asked: The arguments of the registry's functions.
    """
    allowed = stock(**asked | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    padding, device = left_padding(bias, asked.get("attention_mask")), allowed.device
    queries = positions(asked["q_length"], asked.get("q_offset", 0), padding, device)
    keys = positions(asked["kv_length"], asked.get("kv_offset", 0), padding, device)
    mask = bias.dense(queries, keys, planes, asked.get("kv_offset", 0) + asked["kv_length"])
    dtype = asked.get("dtype", torch.float32)
    lowest = torch.finfo(dtype).min
    return torch.where(allowed, mask, lowest).clamp_(min=lowest).to(dtype)


class BlockBias:
    """What is added to the scores of a FlexAttention layer, indexed by (batch, head, query, key) as a tensor is.

    Args:
        entries: The formula of the bias.
        first: The layer's first plane.
        per_head: Whether each head has a plane.
        offsets: The positions of the first query and of the first key.
        padding: Tokens of padding at the start of each row, or None.
    """

    def __init__(self, entries: Entries, first: int, per_head: bool, offsets: tuple[Any, Any], padding: Tensor | None):
        self.entries, self.first, self.per_head, self.offsets, self.padding = entries, first, per_head, offsets, padding

    def __getitem__(self, at: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        batch, head, query, key = at
        plane = head + self.first if self.per_head else torch.zeros_like(head) + self.first
        query, key = query + self.offsets[0], key + self.offsets[1]
        if self.padding is not None:
            query, key = ((i - self.padding[batch]).clamp(min=0) for i in (query, key))
        return self.entries(plane, query, key)

    def of_layer(self, first: int, per_head: bool) -> BlockBias:
        """The planes of a layer."""
        return BlockBias(self.entries, first, per_head, self.offsets, self.padding)


def block_mask(bias: AttentionBias, planes: int, stock: Callable[..., Any], asked: dict[str, Any]) -> Any:
    """The `BlockMask` of FlexAttention, with a `BlockBias` as its attribute `bias`.

    Blocks that a bias drops in all layers and heads are skipped; others are computed, with a weight of zero.

    Args:
        bias: The bias.
        planes: How many planes it has.
        stock: transformers' block mask.
        asked: The arguments of the registry's functions.
    """
    offsets = asked.get("q_offset", 0), asked.get("kv_offset", 0)
    length = offsets[1] + asked["kv_length"]
    padding = left_padding(bias, asked.get("attention_mask"))
    entries = bias.entries(length, planes, asked.get("device", "cpu"))
    added = BlockBias(entries, 0, False, offsets, padding)
    if bias.drops and planes == 1:
        everywhere, theirs = BlockBias(entries, 0, False, (0, 0), padding), asked["mask_function"]

        def both(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return theirs(batch, head, query, key) & (everywhere[batch, head, query, key] > -torch.inf)

        asked = asked | {"mask_function": both}
    mask = stock(**asked | {"allow_is_causal_skip": False})
    mask.bias = added
    return mask

"""The tokens of one call: checked, flattened, compacted to those with a label; and the way back to the labels' shape.

Checks and autocast happen here, once: backends see valid rows only, in one dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .algebra import Head, Stats


class Rows:
    """The valid tokens of one call: checked, flattened, compacted; and the way back to the labels' shape."""

    def __init__(self, hidden: Tensor, head: Head, labels: Tensor, ignore_index: int):
        check_head(hidden, head)
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} but hidden {tuple(hidden.shape)}: pass one label per row of"
                f" hidden, {tuple(hidden.shape[:-1])}"
            )
        if labels.dtype.is_floating_point or labels.dtype == torch.bool:
            raise ValueError(f"labels is {labels.dtype}: pass token ids as int64")
        if labels.device != hidden.device:
            raise ValueError(f"labels is on {labels.device} but hidden on {hidden.device}: move one of them")
        self.labels = labels
        self.mask = labels != ignore_index
        flat = labels.reshape(-1)
        index = self.mask.reshape(-1).nonzero().squeeze(-1)
        self.index = None if len(index) == flat.numel() else index
        self.hidden = autocast(self.select(hidden, trailing=1))
        self.head = autocast_head(head, hidden)
        self.flat = self.select(labels).long()
        low, high = (int(self.flat.min()), int(self.flat.max())) if len(self.flat) else (0, 0)
        if low < 0 or high >= head.vocabulary:
            raise ValueError(
                f"labels range over [{low}, {high}] but the head has {head.vocabulary} tokens: pass ids in"
                f" [0, {head.vocabulary - 1}], or ignore_index={ignore_index} for positions without a label"
            )

    def select(self, x: Tensor, trailing: int = 0) -> Tensor:
        """Valid rows of a tensor shaped like labels (and `trailing` more dimensions)."""
        shape = x.shape[x.ndim - trailing :]
        if x.shape[: x.ndim - trailing] != self.labels.shape:
            raise ValueError(
                f"a per-token tensor has shape {tuple(x.shape)}: its rows must be shaped like labels,"
                f" {tuple(self.labels.shape)}"
            )
        x = x.reshape(-1, *shape)
        return x if self.index is None else x.index_select(0, self.index)

    def scatter(self, values: Mapping[str, Tensor]) -> Stats:
        """Statistics in the labels' shape; ignored positions hold 0."""
        shape = self.labels.shape
        if self.index is None:
            return Stats({name: value.reshape(shape) for name, value in values.items()}, self.labels, self.mask)
        count = self.labels.numel()
        full = {name: value.new_zeros(count).index_copy(0, self.index, value) for name, value in values.items()}
        return Stats({name: value.reshape(shape) for name, value in full.items()}, self.labels, self.mask)


def check_head(hidden: Tensor, head: Head) -> None:
    """Refuse hidden states and a head that do not fit together, with a ValueError that names the remedy."""
    weight, bias = head.weight, head.bias
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: a head needs a non-empty [vocabulary, hidden] matrix"
            " (gather a sharded weight first)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: pass one value per row of weight, [{head.size}]")
    if head.softcap == 0:
        raise ValueError("softcap is 0: pass None for a head without a softcap")
    if hidden.ndim == 0 or hidden.shape[-1] != head.features:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}: its last dimension must be the head's hidden size,"
            f" {head.features}"
        )
    if head.shard is not None and head.size > head.shard.width:
        raise ValueError(f"the head's shard has {head.size} tokens: ranks hold at most {head.shard.width}, in order")
    if hidden.device != weight.device:
        raise ValueError(f"hidden is on {hidden.device} but weight on {weight.device}: move one of them")
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(f"hidden is {hidden.dtype} but weight {weight.dtype}: cast one of them, or use torch.autocast")
    if head.adapter is not None and head.adapter.dtype != weight.dtype and not torch.is_autocast_enabled():
        raise ValueError(f"adapter is {head.adapter.dtype} but weight {weight.dtype}: cast one of them")
    if bias is not None and bias.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(f"bias is {bias.dtype} but weight {weight.dtype}: cast one of them, or use torch.autocast")


def autocast(x: Tensor) -> Tensor:
    """What torch.autocast would make of an operand of F.linear."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def autocast_head(head: Head, hidden: Tensor) -> Head:
    """The head that torch.autocast would multiply with, on the device of `hidden`."""
    if not torch.is_autocast_enabled(hidden.device.type):
        return head
    bias, adapter = (None if x is None else autocast(x) for x in (head.bias, head.adapter))
    return replace(head, weight=autocast(head.weight), bias=bias, adapter=adapter)

"""The tokens of one call: checked, flattened, reduced to those with a label, and put back into the labels' shape.

Checks and autocast happen here, once: backends see valid rows only, in one dtype.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .head import Head
from .statistics import Stats

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Rows:
    """The valid tokens of one call: their hidden states and labels; `scatter` goes back to the labels' shape."""

    def __init__(self, hidden: Tensor, head: Head, labels: Tensor, ignore_index: int):
        check_head(hidden, head)
        labels, ignored = token_ids(labels), ignored_id(ignore_index)
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} but hidden {tuple(hidden.shape)}: pass one label per row of"
                f" hidden, {tuple(hidden.shape[:-1])}"
            )
        if labels.device != hidden.device:
            raise ValueError(f"labels is on {labels.device} but hidden on {hidden.device}: move one of them")
        self.labels = labels
        self.mask = labels != ignored
        self.index = _index(labels.reshape(-1), self.mask.reshape(-1), head.vocabulary, ignored)
        self.hidden = autocast_for(head, self.select(hidden, trailing=1))
        self.head = autocast_head(head, hidden)
        self.flat = self.select(labels)

    def select(self, x: Tensor, trailing: int = 0) -> Tensor:
        """The valid rows of a tensor in the shape of labels, with `trailing` more dimensions."""
        shape = x.shape[x.ndim - trailing :]
        if x.shape[: x.ndim - trailing] != self.labels.shape:
            raise ValueError(
                f"a per-token tensor has shape {tuple(x.shape)}: its rows must be shaped like labels,"
                f" {tuple(self.labels.shape)}"
            )
        x = x.reshape(-1, *shape)
        return x if self.index is None else x.index_select(0, self.index)

    def restored(self, x: Tensor) -> Tensor:
        """A tensor [N, D] of the valid rows in the labels' shape [..., D]; other rows are 0."""
        if self.index is not None:
            x = x.new_zeros(self.labels.numel(), x.shape[-1]).index_copy_(0, self.index, x)
        return x.reshape(*self.labels.shape, -1)

    def scatter(self, values: Mapping[str, Tensor]) -> Stats:
        """Statistics in the labels' shape; ignored positions hold 0."""
        shape = self.labels.shape
        if self.index is None:
            return Stats({name: value.reshape(shape) for name, value in values.items()}, self.labels, self.mask)
        count = self.labels.numel()
        full = {name: value.new_zeros(count).index_copy(0, self.index, value) for name, value in values.items()}
        return Stats({name: value.reshape(shape) for name, value in full.items()}, self.labels, self.mask)


def _index(labels: Tensor, valid: Tensor, size: int, ignored: int) -> Tensor | None:
    """The positions of the valid labels, both [N], or None if all are; raises a ValueError as `check_ids` does.

    A GPU is waited for once: for three numbers, from which the shapes of all that follows are known.
    """
    refuse_capture(labels.device)
    if not len(labels):
        return None
    bounds = torch.iinfo(labels.dtype)
    lows, highs = (torch.where(valid, labels, other) for other in (bounds.max, bounds.min))
    count, low, high = torch.stack([valid.sum(), lows.amin(), highs.amax()]).tolist()
    if count:
        _check_range(low, high, size, ignored)
    return None if count == len(labels) else torch.nonzero_static(valid, size=count).squeeze(-1)


def refuse_capture(device: torch.device) -> None:
    """Raise a RuntimeError that names the remedy while a CUDA graph is captured: the host must read the labels."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the loss is in the capture of a CUDA graph, but the number of valid labels is read on the host: capture"
            " the model up to its hidden states, and compute the loss outside of the graph"
        )


def token_ids(labels: Tensor) -> Tensor:
    """Labels of any integer dtype as int64: in a narrow one an ignore_index of -100 would be a token (156 in uint8).

    Raises: ValueError if labels is not a tensor of integers, or is batched by torch.vmap.
    """
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels is a {type(labels).__name__}: pass a tensor of token ids")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"labels is {labels.dtype}: pass token ids as int64")
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(labels):
        raise ValueError(
            "labels is batched by torch.vmap, but which tokens have a label must be known: write the map as a loop, or"
            " give the mapped dimension to hidden and labels"
        )
    return labels.long()


def ignored_id(ignore_index: int) -> int:
    """The label of positions to ignore as an int. Raises: ValueError for anything else, such as None."""
    if isinstance(ignore_index, bool) or not hasattr(ignore_index, "__index__"):
        raise ValueError(f"ignore_index is {ignore_index!r}: pass an integer, such as -100")
    return operator.index(ignore_index)


def check_ids(ids: Tensor, size: int, ignored: int) -> None:
    """Raise a ValueError that names the remedy if ids are outside of a vocabulary of `size` tokens."""
    if ids.numel():
        low, high = torch.stack([ids.amin(), ids.amax()]).tolist()
        _check_range(low, high, size, ignored)


def _check_range(low: int, high: int, size: int, ignored: int) -> None:
    """The same for the lowest and the highest id."""
    if low < 0 or high >= size:
        raise ValueError(
            f"labels range over [{low}, {high}] but the head has {size} tokens: pass ids in [0, {size - 1}], or"
            f" ignore_index={ignored} for positions without a label"
        )


def check_head(hidden: Tensor, head: Head) -> None:
    """Raise a ValueError that names the remedy if hidden states and head do not fit together."""
    weight, bias, adapter = head.weight, head.bias, head.adapter
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: a head needs a non-empty [vocabulary, hidden] matrix"
            " (gather a sharded weight first)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: pass one value per row of weight, [{head.size}]")
    if adapter is not None and (adapter.ndim != 2 or len(adapter) != head.size):
        raise ValueError(f"adapter has shape {tuple(adapter.shape)}: pass a row per row of weight, [{head.size}, rank]")
    if head.softcap == 0:
        raise ValueError("softcap is 0: pass None for a head without a softcap")
    for name, number in (("scale", head.scale), ("softcap", head.softcap)):
        if number is not None and not math.isfinite(number):
            raise ValueError(f"{name} is {number}: pass a finite number")
    if hidden.ndim == 0 or hidden.shape[-1] != head.features:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}: its last dimension must be the head's hidden size,"
            f" {head.features}"
        )
    if head.shard is not None and head.size > head.shard.width:
        raise ValueError(f"the head's shard has {head.size} tokens: ranks hold at most {head.shard.width}, in order")
    if head.gain is not None and head.gain.shape != weight.shape[:1]:
        raise ValueError(f"gain has shape {tuple(head.gain.shape)}: pass one factor per row of weight, [{head.size}]")
    _check_alike(hidden, head)


def _check_alike(hidden: Tensor, head: Head) -> None:
    """Raise a ValueError if devices differ, or if dtypes differ that neither autocast nor the head casts."""
    weight = head.weight
    operands: dict[str, Any] = {"hidden": hidden, "weight": weight, "bias": head.bias, "adapter": head.adapter}
    for name, x in (operands | {"gain": head.gain}).items():
        if x is not None and x.device != weight.device:
            raise ValueError(f"{name} is on {x.device} but weight on {weight.device}: move one of them")
    for name, x in operands.items():
        if x is not None and x.dtype not in FLOATS:
            raise ValueError(f"{name} is {x.dtype}: pass one of {', '.join(map(str, FLOATS))}")
        if x is not None and x.dtype != weight.dtype and not head.fp32:
            cast = torch.is_autocast_enabled(weight.device.type)
            if not cast or torch.float64 in (x.dtype, weight.dtype):  # autocast leaves float64 alone
                remedy = "cast one of them" + ("" if cast else ", or use torch.autocast")
                raise ValueError(f"{name} is {x.dtype} but weight {weight.dtype}: {remedy}")


def autocast(x: Any) -> Any:
    """An operand of F.linear in the dtype that torch.autocast would cast it to."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def autocast_for(head: Head, hidden: Tensor) -> Tensor:
    """Hidden states in the dtype in which a head multiplies them: float32 for one with `fp32`, else as in autocast."""
    return hidden.to(head.dtype_for(hidden.dtype)) if head.fp32 else autocast(hidden)


def autocast_head(head: Head, hidden: Tensor) -> Head:
    """The head with its tensors cast as torch.autocast would cast them on the device of `hidden`."""
    if head.fp32 or not torch.is_autocast_enabled(hidden.device.type):
        return head
    bias, adapter = (None if x is None else autocast(x) for x in (head.bias, head.adapter))
    return replace(head, weight=autocast(head.weight), bias=bias, adapter=adapter)

"""Rules for sums that are lazy again: with the product of a LoRA branch, or with a bias over the vocabulary.

Each rule returns the result, or NotImplemented: then torch's function is applied to the dense tensor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops import Head
from .answers import register
from .shapes import change_head, derive
from .source import join, shape_of
from .tensor import LazyLogits
from .values import meta_like


def _add(x: LazyLogits, other: Any) -> Any:
    """The sum with another product of the same shape (of a LoRA branch), or with a bias over the vocabulary (BART)."""
    if isinstance(other, LazyLogits) and not other.is_dense:
        return _add_products(x, other)
    if not isinstance(other, Tensor) or x.recipe.outer is not None or x.recipe.log_probs:
        return NotImplemented
    same_kind = other.dtype == x.dtype == x.hidden.dtype and other.device == x.device == x.hidden.device
    is_bias = 0 < other.ndim <= x.ndim and other.shape[-1] == other.numel() == x.shape[-1]
    if not same_kind or not is_bias or x.raw.shard is not None:
        return NotImplemented
    bias = other.reshape(-1) / x.recipe.inner

    def biased(raw: Head) -> Head:
        return replace(raw, bias=bias if raw.bias is None else raw.bias + bias.to(raw.bias.device))

    return change_head(x, biased, layout=torch.empty_like(meta_like(x)))


def _subtract(x: LazyLogits, other: Any) -> Any:
    no_bias = not isinstance(other, Tensor) or isinstance(other, LazyLogits) or not other.is_floating_point()
    return NotImplemented if no_bias else _add(x, -other)


def _add_products(x: LazyLogits, y: LazyLogits) -> Any:
    """The sum of two products, of a head and its LoRA branch, as one product of the concatenated inputs."""
    if x.shape != y.shape:
        return NotImplemented
    big, small = (x, y) if x.raw.weight.shape[1] >= y.raw.weight.shape[1] else (y, x)
    nonlinear = any(lazy.recipe.outer is not None or lazy.recipe.log_probs for lazy in (x, y))
    if nonlinear or any(lazy.raw.shard is not None for lazy in (x, y)):
        return NotImplemented
    ratio, dtype = small.recipe.inner / big.recipe.inner, big.hidden.dtype

    def summed(raw: Head, branch: Head, dtype: torch.dtype) -> Head:
        matrices = [m.to(dtype) for m in (raw.adapter, branch.weight, branch.adapter) if m is not None]
        adapter = matrices[0] if len(matrices) == 1 else torch.cat(matrices, 1)
        biases = [b if head is raw else (b * ratio).to(dtype) for head in (raw, branch) if (b := head.bias) is not None]
        return replace(raw, bias=sum(biases[1:], biases[0]) if biases else None, adapter=adapter)

    def pair(hidden: Tensor, raw: Head, more: Tensor, branch: Head) -> tuple[Tensor, Head]:
        return torch.cat([hidden, more.to(hidden.dtype)], -1), summed(raw, branch, hidden.dtype)

    source = join((big.source, big.raw), (small.source, small.raw), pair, big.hidden.shape[-1])
    heads = (big.raw, small.raw) if source is None else (shape_of(big.raw), shape_of(small.raw))
    attributes = {
        "hidden": torch.cat([big.hidden, (small.hidden * ratio).to(dtype)], -1),
        "raw": summed(*heads, dtype),
        "source": source,
        "dtype": torch.promote_types(x.dtype, y.dtype),
        "layout": torch.empty_like(meta_like(x)),
    }
    return derive(big, operands=x.operands + y.operands, hooks=[*x.hooks, *y.hooks], **attributes)


_T = torch.Tensor
_RULES: dict[Any, Any] = {
    **dict.fromkeys((_T.add, _T.__add__, _T.__radd__, torch.add), _add),
    **dict.fromkeys((_T.sub, _T.__sub__, torch.sub, torch.subtract), _subtract),
}
register(_RULES)

"""What keeps a lazy tensor lazy: casts, scale and softcap, views of its rows, a slice of the vocabulary.

Each rule returns the answer, or NotImplemented to have the dense tensor asked instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .tensor import ANSWERS, LazyLogits, make


def derive(x: LazyLogits, **changes: Any) -> LazyLogits:
    """A lazy tensor that differs in some operands."""
    now = {"hidden": x.hidden, "raw": x.raw, "recipe": x.recipe, "dtype": x.dtype, "device": x.device, "seam": x.seam}
    return make(**{**now, **changes})


def _cast(x: LazyLogits, dtype: torch.dtype) -> LazyLogits:
    return x if dtype == x.dtype else derive(x, dtype=dtype)


def _to(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    """`.to(dtype)`, `.to(device)`, `.to(other)`; on another device the answers will be there, the operands stay."""
    parse: Any = torch._C._nn._parse_to  # its stub leaves out that each answer may be None
    device, dtype, _, memory_format = parse(*(_meta(a) for a in args), **{k: _meta(v) for k, v in kwargs.items()})
    if memory_format is not None:
        return NotImplemented
    moved = device is not None and device != x.device
    x = derive(x, device=device, parent=(x, lambda d: d.to(device))) if moved else x
    return x if dtype is None else _cast(x, dtype)


def _meta(x: Any) -> Any:
    return torch.empty(0, dtype=x.dtype, device=x.device) if isinstance(x, LazyLogits) else x


def _same(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    plain = kwargs.get("memory_format") in (None, torch.preserve_format, torch.contiguous_format)
    return x if plain else NotImplemented


def detach(x: LazyLogits) -> LazyLogits:
    """The same value without its graph, still lazy."""
    raw = x.raw
    bias, adapter = (None if t is None else t.detach() for t in (raw.bias, raw.adapter))
    return derive(x, hidden=x.hidden.detach(), raw=replace(raw, weight=raw.weight.detach(), bias=bias, adapter=adapter))


def _plus(x: LazyLogits, y: Any, **kwargs: Any) -> Any:
    """Two products of the same tokens and vocabulary, a head's and its LoRA branch's: one product of both inputs."""
    if kwargs or not isinstance(y, LazyLogits) or y.is_dense or x.shape != y.shape:
        return NotImplemented
    big, small = (x, y) if x.raw.weight.shape[1] >= y.raw.weight.shape[1] else (y, x)
    heads = (big.raw, small.raw)
    bent = any(lazy.recipe.outer is not None or lazy.recipe.log_probs for lazy in (x, y))
    if bent or big.recipe.inner == 0 or any(head.shard is not None for head in heads):
        return NotImplemented
    ratio, dtype = small.recipe.inner / big.recipe.inner, big.hidden.dtype
    hidden = torch.cat([big.hidden, (small.hidden * ratio).to(dtype)], -1)
    matrices = [m.to(dtype) for m in (big.raw.adapter, small.raw.weight, small.raw.adapter) if m is not None]
    adapter = matrices[0] if len(matrices) == 1 else torch.cat(matrices, 1)
    biases = [b if head is big.raw else (b * ratio).to(dtype) for head in heads if (b := head.bias) is not None]
    bias = sum(biases[1:], biases[0]) if biases else None
    raw = replace(big.raw, bias=bias, adapter=adapter)
    return derive(big, hidden=hidden, raw=raw, dtype=torch.promote_types(x.dtype, y.dtype))


def _times(x: LazyLogits, factor: Any, **kwargs: Any) -> Any:
    number = _number(factor)
    if kwargs or number is None or x.recipe.log_probs or not x.is_floating_point():
        return NotImplemented
    return derive(x, recipe=x.recipe.times(number))


def _divided(x: LazyLogits, divisor: Any, **kwargs: Any) -> Any:
    number = _number(divisor)
    return NotImplemented if not number else _times(x, 1 / number, **kwargs)


def _number(x: Any) -> float | None:
    """A Python number, or a constant scalar tensor's value; None for anything that varies or learns."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    if isinstance(x, Tensor) and x.ndim == 0 and not x.requires_grad and x.device.type == "cpu":
        return float(x)
    return None


def _tanh(x: LazyLogits) -> Any:
    if x.recipe.outer is not None or x.recipe.log_probs:
        return NotImplemented
    return derive(x, recipe=replace(x.recipe, outer=1.0))


def _reshape(x: LazyLogits, *shape: Any) -> Any:
    sizes = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
    if not all(isinstance(n, int) for n in sizes) or not sizes:  # .view(dtype)
        return NotImplemented
    if -1 in sizes:
        known = -math.prod(sizes)
        sizes[sizes.index(-1)] = x.numel() // known if known else 0
    if sizes[-1] != x.shape[-1] or math.prod(sizes) != x.numel():
        return NotImplemented
    return _rows(x, lambda h: h.reshape(*sizes[:-1], h.shape[-1]), lambda d: d.reshape(sizes))


def _rows(
    x: LazyLogits,
    on_hidden: Callable[[Tensor], Tensor],
    on_dense: Callable[[Tensor], Tensor],
) -> LazyLogits:
    return derive(x, hidden=on_hidden(x.hidden), parent=(x, on_dense))


def _view_as(x: LazyLogits, other: Tensor) -> Any:
    return _reshape(x, *other.shape)


def _flatten(x: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = start_dim % x.ndim, end_dim % x.ndim
    if end == x.ndim - 1:
        return NotImplemented
    return _reshape(x, *x.shape[:start], -1, *x.shape[end + 1 :])


def _unsqueeze(x: LazyLogits, dim: int) -> Any:
    place = dim % (x.ndim + 1)
    return NotImplemented if place == x.ndim else _rows(x, lambda h: h.unsqueeze(place), lambda d: d.unsqueeze(place))


def _squeeze(x: LazyLogits, *dims: Any) -> Any:
    if len(dims) != 1 or not isinstance(dims[0], int) or dims[0] % x.ndim == x.ndim - 1:
        return NotImplemented
    return _rows(x, lambda h: h.squeeze(dims[0] % x.ndim), lambda d: d.squeeze(dims[0] % x.ndim))


def _transpose(x: LazyLogits, dim0: int, dim1: int) -> Any:
    """Of rows alone: ProphetNet scores all its prediction streams at once, and turns them to the front first."""
    a, b = dim0 % x.ndim, dim1 % x.ndim
    if x.ndim - 1 in (a, b):
        return NotImplemented
    return _rows(x, lambda h: h.transpose(a, b), lambda d: d.transpose(a, b))


def _getitem(x: LazyLogits, index: Any) -> Any:
    """Rows by slices, integers, masks or index tensors; a slice of the vocabulary in the last place."""
    index = index if isinstance(index, tuple) else (index,)
    index = tuple(i.to(x.hidden.device) if isinstance(i, Tensor) else i for i in index)
    used = sum(
        i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else 1
        for i in index
        if i is not None and i is not ...
    )
    counted_from_the_end = any(i is ... for i in index) and index[-1] is not ...
    vocabulary = slice(None)
    if counted_from_the_end or used >= x.ndim:
        if used > x.ndim or not isinstance(index[-1], slice):
            return NotImplemented
        index, vocabulary = (*index[:-1], slice(None)), index[-1]
    untouched = all(i is ... or i == slice(None) if not isinstance(i, Tensor) else False for i in index)
    return _vocabulary(x if untouched else _rows(x, lambda h: h[index], lambda d: d[index]), vocabulary)


def _vocabulary(x: LazyLogits, part: slice) -> Any:
    if part == slice(None) or range(*part.indices(x.shape[-1])) == range(x.shape[-1]):
        return x
    if x.recipe.log_probs or x.raw.shard is not None:
        return NotImplemented
    return derive(x, raw=x.raw[part], parent=(x, lambda d: d[..., part]))


_T = torch.Tensor
_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((_T.contiguous, _T.clone, torch.clone), _same),
    **dict.fromkeys((_T.detach, torch.detach), detach),
    **dict.fromkeys((_T.add, _T.__add__, _T.__radd__, torch.add), _plus),
    **dict.fromkeys((_T.mul, _T.__mul__, _T.__rmul__, torch.mul, torch.multiply), _times),
    **dict.fromkeys((_T.div, _T.__truediv__, torch.div, torch.true_divide), _divided),
    **dict.fromkeys((_T.tanh, torch.tanh), _tanh),
    **dict.fromkeys((_T.view, _T.reshape, torch.reshape), _reshape),
    **dict.fromkeys((_T.flatten, torch.flatten), _flatten),
    **dict.fromkeys((_T.unsqueeze, torch.unsqueeze), _unsqueeze),
    **dict.fromkeys((_T.squeeze, torch.squeeze), _squeeze),
    **dict.fromkeys((_T.transpose, torch.transpose), _transpose),
    _T.float: lambda x: _cast(x, torch.float32),
    _T.double: lambda x: _cast(x, torch.float64),
    _T.half: lambda x: _cast(x, torch.float16),
    _T.bfloat16: lambda x: _cast(x, torch.bfloat16),
    _T.to: _to,
    _T.view_as: _view_as,
    _T.__getitem__: _getitem,
}
ANSWERS.update(_RULES)

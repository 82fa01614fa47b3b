"""Rules whose result is lazy again: casts, views of rows, slices of the vocabulary; `arithmetic` has scale and sums.

Each rule returns the result, or NotImplemented: then torch's function is applied to the dense tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import Head
from ..ops.rows import FLOATS
from .answers import Answer, register
from .expressions import LazyExpression
from .source import changed, shape_of
from .tensor import LazyLogits
from .values import LazyTensor, meta_like


def change_head(x: LazyLogits, change: Callable[[Head], Head], **changes: Any) -> LazyLogits:
    """A lazy tensor of a head that is a function of that of x."""
    raw = change(x.raw)
    return x.derived(raw=raw if x.source is None else shape_of(raw), source=changed(x.source, change), **changes)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x if dtype == x.dtype else x.cast(dtype)


def _to(x: Any, *args: Any, **kwargs: Any) -> Any:
    """`.to(dtype)`, `.to(device)`, `.to(other)`; on another device the results will be there, the operands stay."""
    copy = kwargs.pop("copy", False)
    if len(args) > 2 and isinstance(args[-1], bool):  # (device or other, dtype, non_blocking, copy)
        return NotImplemented
    parse: Any = torch._C._nn._parse_to  # its stub omits that each result may be None
    device, dtype, _, memory_format = parse(*(_empty(a) for a in args), **{k: _empty(v) for k, v in kwargs.items()})
    if memory_format is not None:
        return NotImplemented
    device, dtype = device or x.device, dtype or x.dtype
    if dtype not in FLOATS:
        return NotImplemented
    if device != x.device:
        return NotImplemented if isinstance(x, LazyExpression) else x.derived(device=device, dtype=dtype)
    return x if dtype == x.dtype and not copy else x.cast(dtype)


def _empty(x: Any) -> Any:
    return torch.empty(0, dtype=x.dtype, device=x.device) if isinstance(x, LazyTensor) else x


def _clone(x: LazyLogits, *, memory_format: Any = torch.preserve_format) -> Any:
    if memory_format not in (torch.preserve_format, torch.contiguous_format):
        return NotImplemented
    copy = x.copied(contiguous=memory_format is torch.contiguous_format)
    if isinstance(copy, LazyLogits):  # wrappers' functions get logits, not expressions
        copy.copy_of = x if x.differentiable and not torch.is_grad_enabled() else None
    return copy


def _contiguous(x: LazyLogits, memory_format: Any = torch.contiguous_format) -> Any:
    if memory_format is not torch.contiguous_format:
        return NotImplemented
    return x if x.is_contiguous() else x.copied(contiguous=True)


def _detach(x: Any) -> Any:
    """The same values without a graph, still lazy."""
    return x.detached()


def _reshape(x: LazyLogits, *sizes: Any, shape: Any = None) -> Any:
    """`reshape`, and below `view`, that leave the vocabulary last."""
    return _change_shape(x, torch.Tensor.reshape, sizes, shape)


def _view(x: LazyLogits, *sizes: Any, size: Any = None) -> Any:
    return _change_shape(x, torch.Tensor.view, sizes, size)


def _change_shape(x: LazyLogits, layout: Callable[..., Tensor], sizes: tuple[Any, ...], size: Any) -> Any:
    if len(sizes) == 1 and not isinstance(sizes[0], int):
        size, sizes = sizes[0], ()
    sizes = tuple(sizes if size is None else size) if not isinstance(size, torch.dtype) else (size,)
    if not sizes or not all(isinstance(n, int) for n in sizes):  # .view(dtype)
        return NotImplemented
    after = layout(meta_like(x), sizes).shape  # raises torch's error for sizes that do not fit
    if not after or after[-1] != x.shape[-1]:
        return NotImplemented
    return x.with_rows(lambda h: h.reshape(*after[:-1], h.shape[-1]), lambda d: layout(d, after))


def _view_as(x: LazyLogits, other: Tensor) -> Any:
    return _view(x, *other.shape)


def _reshape_as(x: LazyLogits, other: Tensor) -> Any:
    return _reshape(x, *other.shape)


def _flatten(x: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = canonical_dim(x, start_dim), canonical_dim(x, end_dim)
    if start is None or end is None or not start <= end < x.ndim - 1:
        return NotImplemented
    return _reshape(x, *x.shape[:start], -1, *x.shape[end + 1 :])


def _unsqueeze(x: LazyLogits, dim: int) -> Any:
    at = canonical_dim(x, dim, x.ndim + 1)
    if at is None or at == x.ndim:
        return NotImplemented
    return x.with_rows(lambda h: h.unsqueeze(at), lambda d: d.unsqueeze(at))


def _squeeze(x: LazyLogits, dim: int) -> Any:
    at = canonical_dim(x, dim)
    if at is None or at == x.ndim - 1:
        return NotImplemented
    return x.with_rows(lambda h: h.squeeze(at), lambda d: d.squeeze(at))


def _transpose(x: LazyLogits, dim0: int, dim1: int) -> Any:
    """Of row dimensions alone: ProphetNet moves its prediction streams to the front, to score all of them at once."""
    a, b = canonical_dim(x, dim0), canonical_dim(x, dim1)
    if a is None or b is None or x.ndim - 1 in (a, b):
        return NotImplemented
    return x.with_rows(lambda h: h.transpose(a, b), lambda d: d.transpose(a, b))


def canonical_dim(x: LazyLogits, dim: Any, count: int | None = None) -> int | None:
    """A dimension counted from 0; None if x has no such dimension, so that torch raises its error."""
    count = x.ndim if count is None else count
    return dim % count if isinstance(dim, int) and not isinstance(dim, bool) and -count <= dim < count else None


def _getitem(x: Any, index: Any) -> Any:
    """Rows by slices, integers, masks or index tensors; a slice of the vocabulary in the last canonical_dim."""
    device = x.device if isinstance(x, LazyExpression) else x.hidden.device
    index = tuple(_normalized_index(i, device) for i in (index if isinstance(index, tuple) else (index,)))
    if not all(
        i is None or i is ... or (isinstance(i, (int, slice, Tensor)) and not isinstance(i, bool)) for i in index
    ):
        return NotImplemented
    used = sum(_consumed_dims(i) for i in index)
    counted_from_the_end = any(i is ... for i in index) and index[-1] is not ...
    vocabulary = slice(None)
    if counted_from_the_end or used >= x.ndim:
        if used > x.ndim or not isinstance(index[-1], slice):
            return NotImplemented
        index, vocabulary = (*index[:-1], slice(None)), index[-1]
    copied = any(isinstance(i, Tensor) for i in index)
    layout = meta_like(x)[(*index[:-1], vocabulary)] if copied and vocabulary != slice(None) else None
    if not all(i is ... or (isinstance(i, slice) and i == slice(None)) for i in index):
        x = _index_rows(x, index)
    return _slice_vocabulary(x, vocabulary, layout)


def _normalized_index(i: Any, device: torch.device) -> Any:
    """An index in a normal form: integers of any kind as int, flat lists as tensors on the device of hidden."""
    if isinstance(i, np.integer) or (isinstance(i, Tensor) and i.ndim == 0 and i.dtype in _INTEGERS):
        return int(i)
    if isinstance(i, np.ndarray) or (isinstance(i, list) and i and all(isinstance(n, int) for n in i)):
        i = torch.as_tensor(i)
    return i.to(device) if isinstance(i, Tensor) else i


def _consumed_dims(i: Any) -> int:
    """How many dimensions of the tensor an index refers to."""
    if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8):
        return i.ndim
    return 0 if i is None or i is ... else 1


def _index_rows(x: Any, index: tuple[Any, ...]) -> Any:
    if any(isinstance(i, Tensor) for i in index) and not isinstance(x, LazyExpression):  # a copy
        return x.derived(hidden=x.hidden[index])
    return x.with_rows(lambda h: h[index], lambda d: d[index])


def _slice_vocabulary(x: Any, part: slice, layout: Tensor | None) -> Any:
    """A slice of the vocabulary: a view, or a copy with the strides of `layout` if the whole index makes a copy."""
    if part == slice(None) or range(*part.indices(x.shape[-1])) == range(x.shape[-1]):
        return x
    if isinstance(x, LazyExpression) or x.recipe.log_probs or x.raw.shard is not None:
        return NotImplemented
    if layout is not None:
        return change_head(x, lambda raw: raw[part], layout=layout)
    return change_head(x, lambda raw: raw[part], parent=(x, lambda d: d[..., part]))


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)
_T = torch.Tensor
_RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((_T.clone, torch.clone), _clone),
    **dict.fromkeys((_T.detach, torch.detach), _detach),
    **dict.fromkeys((_T.reshape, torch.reshape), _reshape),
    **dict.fromkeys((_T.flatten, torch.flatten), _flatten),
    **dict.fromkeys((_T.unsqueeze, torch.unsqueeze), _unsqueeze),
    **dict.fromkeys((_T.squeeze, torch.squeeze), _squeeze),
    **dict.fromkeys((_T.transpose, torch.transpose), _transpose),
    _T.float: lambda x: _cast(x, torch.float32),
    _T.double: lambda x: _cast(x, torch.float64),
    _T.half: lambda x: _cast(x, torch.float16),
    _T.bfloat16: lambda x: _cast(x, torch.bfloat16),
    _T.contiguous: _contiguous,
    _T.to: _to,
    _T.view: _view,
    _T.view_as: _view_as,
    _T.reshape_as: _reshape_as,
    _T.__getitem__: _getitem,
}
register(_RULES)


def _of_expression(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for expressions whose rows come first."""

    @functools.wraps(rule)
    def changed(x: Any, *args: Any, **kwargs: Any) -> Any:
        return NotImplemented if x.front else rule(x, *args, **kwargs)

    return changed


LazyExpression.answers.update({function: Answer(_of_expression(rule)) for function, rule in _RULES.items()})

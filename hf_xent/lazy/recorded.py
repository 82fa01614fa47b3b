"""Rules that record what torch functions make of lazy logits, and those that compute what has fewer numbers than they.

    recorded    functions of single numbers, softmax, log_softmax, divergences; a stack, and what is reduced over it
    computed    reductions over the vocabulary, a few columns, losses of labels, sums and means over everything

Each rule returns the result, or NotImplemented: then torch's function is applied to the dense tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from ..ops.higher import under_function_transform
from .answering import RECORDED
from .answers import Answer
from .expressions import LazyExpression, express, streamed
from .nodes import MARK, Node, Operation, Product, Rows, Shared, logits
from .operands import version
from .shapes import canonical_dim
from .tensor import LazyLogits
from .values import LazyTensor, meta_like

_FEW = 8  # so many times fewer columns than the vocabulary has are few


class _Dense(Exception):
    """An argument that only the dense tensors can be combined with."""


def _is_recorded(x: Any) -> bool:
    """Whether an argument is recorded; logits are if the losses of their model are computed outside of it."""
    if not isinstance(x, LazyTensor) or x.is_dense or not x.ndim:
        return False
    if isinstance(x, LazyExpression):
        return True
    is_there = isinstance(x, LazyLogits) and x.source is None and x.raw.shard is None and x.device == x.hidden.device
    return is_there and x.state.always > 0 and not under_function_transform(x.hidden)


def _node_of(x: Any) -> Node:
    """The node of a recorded tensor, which now counts as read."""
    x.note_read(MARK)
    if isinstance(x, LazyExpression):
        return x.node
    return logits(Product(x.hidden, x.raw, x.operands, x.reads, tuple(x.hooks), x.state), x.recipe)


def _record(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The expression of a function that works on each number alone, or on each row, and keeps the shape."""
    recorded = [x for x in tree_leaves((args, kwargs)) if _is_recorded(x)]
    if not recorded or any(x.shape != recorded[0].shape or _front(x) != _front(recorded[0]) for x in recorded):
        return NotImplemented
    first = recorded[0]
    layout = _layout(function, args, kwargs)
    if not isinstance(layout, Tensor) or layout.shape != first.shape:
        return NotImplemented
    try:
        nodes = tree_map(lambda x: _operand(x, first), (args, kwargs))
    except _Dense:
        return NotImplemented
    return express(Operation(function, *nodes), layout, first.device, front=_front(first))


def _front(x: Any) -> int:
    return x.front if isinstance(x, LazyExpression) else 0


def _layout(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What torch returns for tensors without values: the shape, strides and dtype of the result, or torch's error."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    found = function(*tree_map(_empty, args), **tree_map(_empty, kwargs))
    device = next(x.device for x in tensors if isinstance(x, LazyTensor))
    if isinstance(found, Tensor) and torch.is_autocast_enabled(device.type):  # which leaves meta tensors alone
        one = function(*tree_map(_single, args), **tree_map(_single, kwargs))
        return found.to(one.dtype)
    return found


def _empty(x: Any) -> Any:
    return meta_like(x) if isinstance(x, Tensor) else x  # type: ignore[arg-type]  # any tensor has a shape and strides


def _single(x: Any) -> Any:
    """A tensor of one number with the dtype, device and number of dimensions of x."""
    return torch.zeros((1,) * x.ndim, dtype=x.dtype, device=x.device) if isinstance(x, Tensor) else x


def _operand(x: Any, first: Any) -> Any:
    """The node of an argument, or the argument itself if it is no tensor. Raises: _Dense if it has other rows."""
    if _is_recorded(x):
        return _node_of(x)
    if not isinstance(x, Tensor):
        return x
    x = x.dense() if isinstance(x, LazyTensor) else x
    if type(x) not in (Tensor, torch.nn.Parameter) or under_function_transform(x) or x.layout != torch.strided:
        raise _Dense
    if x.ndim == 0:
        return Shared(x.clone())
    front, size = _front(first), first.shape[-1]
    if x.device != first.device:
        raise _Dense
    if x.shape[-1] == x.numel() == size:
        return Shared(x.reshape(-1).clone())
    if front and x.ndim == first.ndim:  # a number for each part of the stack
        if x.numel() != x.shape[0]:
            raise _Dense
        return Shared(x.reshape(-1, 1, 1).clone())
    return _rows(x, first.shape[front:-1], size)


def _rows(x: Tensor, rows: torch.Size, size: int) -> Rows:
    """A tensor with a number for each row, or with all rows; a small one is copied, so that it may be written to."""
    if x.shape[-1] == 1 or size == 1:
        x = x.expand(*rows, x.shape[-1]).clone()
    elif x.shape != (*rows, size):
        raise _Dense
    return Rows(x, version(x))


def _softmax(function: Any, x: Any, dim: Any = None, _stacklevel: Any = 3, dtype: torch.dtype | None = None) -> Any:
    dtype = _stacklevel if isinstance(_stacklevel, torch.dtype) else dtype
    if not _is_recorded(x) or canonical_dim(x, dim) != x.ndim - 1:
        return NotImplemented
    return _record(function, x, -1, dtype=dtype)


def _loss(
    function: Any, input: Any, target: Any, size_average: Any = None, reduce: Any = None, reduction: str = "mean",
    **options: Any,
) -> Any:  # fmt: skip
    """A loss of numbers: recorded, and then reduced as usual."""
    if size_average is not None or reduce is not None or reduction not in ("none", "mean", "sum", "batchmean"):
        return NotImplemented
    if reduction == "batchmean" and function is not F.kl_div:
        return NotImplemented
    each = _record(function, input, target, reduction="none", **options)
    if reduction == "none" or not isinstance(each, LazyExpression):
        return each
    _layout(function, (input, target), {"reduction": reduction, **options})  # for torch's warning about a mean
    total = _reduce(torch.mean if reduction == "mean" else torch.sum, each)
    return total / each.shape[0] if reduction == "batchmean" else total


def _kl_div(
    input: Any, target: Any, size_average: Any = None, reduce: Any = None, reduction: str = "mean",
    log_target: bool = False,
) -> Any:  # fmt: skip
    return _loss(F.kl_div, input, target, size_average, reduce, reduction, log_target=log_target)


def _stack(tensors: Any, dim: int = 0) -> Any:
    """Expressions of the same rows, one after the other."""
    if not isinstance(tensors, (tuple, list)) or not all(isinstance(x, Tensor) for x in tensors):
        return NotImplemented
    first = next((x for x in tensors if _is_recorded(x)), None)
    if first is None or any(_front(x) or x.shape != first.shape for x in tensors) or not first.numel():
        return NotImplemented
    layout = _layout(torch.stack, (tuple(tensors), dim), {})
    if dim not in (0, -layout.ndim):
        return NotImplemented
    try:
        nodes = [_operand(x, first) for x in tensors]
    except _Dense:
        return NotImplemented
    if any(isinstance(x, Shared) for x in nodes):  # a single row looks like one
        return NotImplemented
    return express(Operation.of(torch.stack, nodes), layout, first.device, front=1)


def _reduce(function: Any, x: Any, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    """A reduction over the vocabulary or over everything, computed; or over the parts of a stack, recorded."""
    if not _is_recorded(x) or dtype is not None:
        return NotImplemented
    given = () if dim is None or dim == () else tuple(dim) if isinstance(dim, (tuple, list)) else (dim,)
    dims = [canonical_dim(x, d) for d in given]
    if None in dims:
        return NotImplemented
    layout = _layout(function, (x, *(() if dim is None else (dim, keepdim))), {})
    if not dims or len(set(dims)) == x.ndim:
        return NotImplemented if keepdim or function not in (torch.sum, torch.mean) else _total(function, x, layout)
    if dims == [0] and _front(x):
        if keepdim:
            return NotImplemented
        return express(Operation.of(function, _node_of(x), 0), layout, x.device)
    if dims != [x.ndim - 1] or _front(x):
        return NotImplemented
    found = streamed(_node_of(x), lambda value: function(value, -1), total=False)
    return found.reshape(layout.shape).to(layout.dtype)


def _total(function: Any, x: Any, layout: Tensor) -> Tensor:
    """The sum or the mean of all numbers; their gradient takes no second visit."""
    front = _front(x)

    def by_row(value: Tensor) -> Tensor:
        return value.sum((0, 2)) if front else value.sum(-1)

    found = streamed(_node_of(x), by_row, total=True)
    return (found / x.numel() if function is torch.mean else found).to(layout.dtype)


def _gather(x: Any, dim: int, index: Any, *, sparse_grad: bool = False) -> Any:
    """A few columns of each row."""
    if not _is_recorded(x) or _front(x) or sparse_grad or canonical_dim(x, dim) != x.ndim - 1:
        return NotImplemented
    if type(index) is not Tensor or index.shape[:-1] != x.shape[:-1] or index.dtype != torch.int64:
        return NotImplemented
    if index.ndim != x.ndim or index.device != x.device or index.shape[-1] * _FEW > x.shape[-1]:
        return NotImplemented
    node = Operation.of(torch.gather, _node_of(x), -1, Rows(index, version(index)))
    found = streamed(node, lambda value: value, total=False)
    return found.reshape(index.shape).to(x.dtype)


def _label_loss(  # noqa: PLR0913  the arguments are torch's
    function: Any, x: Any, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", **smoothing: float,
) -> Any:  # fmt: skip
    """The cross-entropy of an expression [N, V]: of logits that were masked or shifted. 0 if every label is ignored."""
    given = isinstance(x, LazyExpression) and _is_recorded(x) and type(target) is Tensor and x.ndim == 2
    if not given or weight is not None or size_average is not None or reduce is not None:
        return NotImplemented
    if target.dtype != torch.int64 or target.shape != x.shape[:1] or reduction not in ("none", "mean", "sum"):
        return NotImplemented
    labels = Rows(target[:, None].clone(), 0)
    node = Operation.of(_of_labels, function, _node_of(x), labels, {"ignore_index": ignore_index, **smoothing})
    found = streamed(node, lambda value: value, total=reduction != "none")
    return (found / (target != ignore_index).sum().clamp(min=1) if reduction == "mean" else found).to(x.dtype)


def _of_labels(function: Any, value: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
    """The losses [n] of some rows."""
    return function(value, labels.squeeze(-1), reduction="none", **options)


_T = torch.Tensor
_NUMBERS = (
    "abs absolute exp expm1 log log1p log2 neg negative square sqrt rsqrt reciprocal sigmoid tanh relu clamp clip"
    " clamp_min clamp_max add sub subtract rsub mul multiply div divide true_divide pow maximum minimum where"
    " masked_fill logaddexp xlogy lt le gt ge eq ne isfinite isinf isnan nan_to_num logical_and logical_or logical_not"
    " __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __rdiv__ __pow__ __rpow__ __neg__"
    " __abs__ __lt__ __le__ __gt__ __ge__ __eq__ __ne__ __and__ __or__ __invert__"
)
_PLAIN = {getattr(place, name) for name in _NUMBERS.split() for place in (torch, _T) if hasattr(place, name)}
_PLAIN |= {F.logsigmoid, F.softplus}


class _Elementwise(Answer):
    """A function of numbers: whatever its arguments are called, torch checks them."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result, or NotImplemented."""
        return NotImplemented if kwargs.get("out") is not None else _record(self.function, *args, **kwargs)


RECORDED.update({function: _Elementwise(function) for function in _PLAIN})
for _name in ("softmax", "log_softmax"):
    _own = getattr(torch, _name)
    RECORDED.update(dict.fromkeys((getattr(_T, _name), _own, getattr(F, _name)), Answer(partial(_softmax, _own))))
for _name in ("sum", "mean", "logsumexp", "amax", "amin", "argmax", "argmin"):
    _own = getattr(torch, _name)
    RECORDED.update(dict.fromkeys((getattr(_T, _name), _own), Answer(partial(_reduce, _own))))
for _own in (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss):
    RECORDED[_own] = Answer(partial(_loss, _own))
RECORDED.update(
    {F.kl_div: Answer(_kl_div)} | {f: Answer(partial(_label_loss, f)) for f in (F.cross_entropy, F.nll_loss)}
)
RECORDED[torch.stack] = Answer(_stack)
RECORDED.update(dict.fromkeys((_T.gather, torch.gather), Answer(_gather)))

"""Rules for sums and factors: what adapters, biases, scales and softcaps make of a head's product is one head again.

    number * z            the recipe's factor
    vector [V] * z        the head's gain, and a factor of its bias and adapter (DoRA's magnitudes, IA3, VeRA)
    z + vector [V]        the head's bias
    z + other product     the same weight and hidden states: gains are added; else more columns of the adapter (LoRA)

Each rule returns the result, or NotImplemented: then torch's function is applied to the dense tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops import Head
from ..ops.higher import under_function_transform
from ..ops.rows import FLOATS
from .answers import register
from .operands import Operand
from .shapes import change_head
from .source import join, shape_of
from .tensor import LazyLogits
from .values import meta_like

_WITHIN_LAYER: ContextVar[bool] = ContextVar("_WITHIN_LAYER", default=False)


@contextmanager
def within_layer() -> Iterator[None]:
    """The context of a layer's own forward, where nobody else has the results: they are added to out of place."""
    token = _WITHIN_LAYER.set(True)
    try:
        yield
    finally:
        _WITHIN_LAYER.reset(token)


def is_linear(x: LazyLogits) -> bool:
    """Whether a tensor is a multiple of its head's product, over the whole vocabulary on this rank."""
    return x.recipe.outer is None and not x.recipe.log_probs and x.raw.shard is None


def _add(x: LazyLogits, other: Any) -> Any:
    """The sum with another product of the same shape (of a LoRA branch), or with a bias over the vocabulary (BART)."""
    if isinstance(other, LazyLogits) and not other.is_dense:
        return _add_products(x, other)
    if not isinstance(other, Tensor) or x.recipe.outer is not None or x.recipe.log_probs:
        return NotImplemented
    can_join = other.dtype in FLOATS and other.device == x.device == x.hidden.device
    is_bias = 0 < other.ndim <= x.ndim and other.shape[-1] == other.numel() == x.shape[-1]
    shard = x.raw.shard
    if not can_join or not is_bias or (shard is not None and other.requires_grad):
        return NotImplemented
    dtype = torch.promote_types(x.dtype, other.dtype)  # torch's; under autocast a bias is wider than the product
    bias = (other.reshape(-1) / x.recipe.inner).to(x.hidden.dtype)
    bias = bias if shard is None else bias[shard.start : shard.start + x.raw.size]

    def biased(raw: Head) -> Head:
        return replace(raw, bias=bias if raw.bias is None else raw.bias + bias.to(raw.bias.device))

    return change_head(x, biased, dtype=dtype)


def _subtract(x: LazyLogits, other: Any) -> Any:
    if isinstance(other, LazyLogits) and not other.is_dense:
        negative = _multiply(other, -1)
        return NotImplemented if negative is NotImplemented else _add_products(x, negative)
    no_bias = not isinstance(other, Tensor) or isinstance(other, LazyLogits) or not other.is_floating_point()
    return NotImplemented if no_bias else _add(x, -other)


def _add_in_place(x: LazyLogits, other: Any) -> Any:
    """`result += branch` of an adapter; x itself has the new value too, as if it had been written to."""
    if not _WITHIN_LAYER.get() or x.parent is not None or x.reads:
        return NotImplemented
    new = _add(x, other)
    if new is not NotImplemented:
        new = new.derived(dtype=x.dtype)
        for name in ("hidden", "raw", "recipe", "operands", "source", "product_of", "hooks", "differentiable"):
            setattr(x, name, getattr(new, name))
    return new


def _zeros_like(x: LazyLogits, *, dtype: Any = None, requires_grad: bool = False) -> Any:
    """The zeros that an adapter begins its sum with: a product of no features."""
    if not _WITHIN_LAYER.get() or not isinstance(x.raw.weight, Tensor) or dtype is not None or requires_grad:
        return NotImplemented
    raw = Head(x.raw.weight.new_empty((x.raw.size, 0), device=x.hidden.device), shard=x.raw.shard)
    layout = torch.empty_like(meta_like(x))
    return x.derived(hidden=x.hidden[..., :0].detach(), raw=raw, source=None, layout=layout)


def _add_products(x: LazyLogits, y: LazyLogits) -> Any:
    """The sum of two products, as one product of the concatenated inputs, or with the sum of their gains."""
    if x.shape != y.shape or not (is_linear(x) and is_linear(y)):
        return NotImplemented
    dtype, layout = torch.promote_types(x.dtype, y.dtype), torch.empty_like(meta_like(x))
    for zeros, other in ((x, y), (y, x)):
        if zeros.raw.weight.shape[1] == 0 and zeros.raw.adapter is zeros.raw.bias is None:
            return other.derived(dtype=dtype, layout=layout)
    is_there = x.source is y.source is None
    same = is_there and x.product_of is not None and x.product_of is y.product_of and x.raw.weight is y.raw.weight
    big, small = (x, y) if x.raw.weight.shape[1] >= y.raw.weight.shape[1] else (y, x)
    if not (same or isinstance(small.raw.weight, Tensor)):
        return NotImplemented
    ratio = small.recipe.inner / big.recipe.inner

    def pair(hidden: Tensor, raw: Head, more: Tensor, branch: Head) -> tuple[Tensor, Head]:
        joined = torch.cat([hidden, more.to(hidden.dtype)], -1) if more.shape[-1] else hidden
        return joined, _sum_of_heads(raw, branch, ratio, hidden.dtype, same)

    source = join((big.source, big.raw), (small.source, small.raw), pair, big.hidden.shape[-1])
    heads = (big.raw, small.raw) if is_there else (shape_of(big.raw), shape_of(small.raw))
    extra = small.hidden[..., small.raw.weight.shape[1] :] if same else small.hidden
    hidden, raw = pair(big.hidden, heads[0], extra * ratio, heads[1])
    operands, hooks = x.operands + y.operands, [*x.hooks, *(h for h in y.hooks if h not in x.hooks)]
    attributes = {"dtype": dtype, "layout": layout, "operands": operands, "source": source, "hooks": hooks}
    return big.derived(hidden=hidden, raw=raw, product_of=big.product_of, **attributes)


def _sum_of_heads(raw: Head, branch: Head, ratio: float, dtype: torch.dtype, same: bool) -> Head:
    """The head of one product plus `ratio` times that of a branch, whose matrices become columns of the adapter.

    If they are the `same` product, their gains are added instead. The branch's hidden states have the ratio already.
    """
    gain, matrix = raw.gain, None
    if same:
        gain = _gain(raw, 1.0, dtype) + _gain(branch, ratio, dtype)
    elif isinstance(branch.weight, Tensor):
        matrix = branch.weight if branch.gain is None else branch.weight * branch.gain[:, None]
    columns = [m.to(dtype) for m in (raw.adapter, matrix, branch.adapter) if m is not None]
    adapter = None if not columns else columns[0] if len(columns) == 1 else torch.cat(columns, 1)
    bias = raw.bias
    if branch.bias is not None:
        more = (branch.bias * ratio).to(dtype)
        bias = more if bias is None else bias + more
    return replace(raw, bias=bias, adapter=adapter, gain=gain)


def _gain(raw: Head, ratio: float, dtype: torch.dtype) -> Tensor:
    """The factors of the rows of a head's weight times a number, [V]."""
    if raw.gain is not None:
        return raw.gain * ratio
    return torch.full((raw.size,), ratio, dtype=dtype, device=raw.weight.device)


def _multiply(x: LazyLogits, other: Any) -> Any:
    number = _number(other)
    if number is None:
        return _scale_columns(x, other)
    if x.recipe.log_probs or not x.is_floating_point():
        return NotImplemented
    recipe = x.recipe.times(number)
    return x.derived(recipe=recipe) if recipe.is_regular else NotImplemented


def _scale_columns(x: LazyLogits, other: Any) -> Any:
    """The product with one factor per token of the vocabulary, or with one that is a tensor."""
    if not isinstance(other, Tensor) or isinstance(other, LazyLogits) or not other.is_floating_point():
        return NotImplemented
    size = x.shape[-1]
    is_row = other.numel() == 1 or (other.ndim > 0 and other.shape[-1] == other.numel() == size)
    here = other.device == x.hidden.device == x.device
    if not is_row or other.ndim > x.ndim or not here or not is_linear(x) or under_function_transform(other):
        return NotImplemented
    row = other.reshape(-1).expand(size)

    def scaled(raw: Head) -> Head:
        factor = row.to(raw.weight.device)
        bias = None if raw.bias is None else (raw.bias * factor).to(raw.bias.dtype)
        adapter = None if raw.adapter is None else (raw.adapter * factor[:, None]).to(raw.adapter.dtype)
        return replace(raw, bias=bias, adapter=adapter, gain=factor if raw.gain is None else raw.gain * factor)

    dtype = x.dtype if other.ndim == 0 else torch.promote_types(x.dtype, other.dtype)
    return change_head(x, scaled, dtype=dtype, operands=(*x.operands, Operand.of("gain", other)))


def _divide(x: LazyLogits, other: Any) -> Any:
    number = _number(other)
    if number is None and isinstance(other, Tensor) and other.is_floating_point():
        return _scale_columns(x, other.reciprocal())
    return NotImplemented if not number else _multiply(x, 1 / number)


def _negative(x: LazyLogits) -> Any:
    return _multiply(x, -1)


def _number(x: Any) -> float | None:
    """The value of a Python number or a constant scalar tensor on a CPU; None for anything else."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    if isinstance(x, Tensor) and x.ndim == 0 and not x.requires_grad and x.device.type == "cpu":
        return None if x.is_complex() or under_function_transform(x) else float(x)
    return None


def _matmul(x: LazyLogits, other: Any) -> Any:
    """The product with a few columns [V, r], which an adapter goes on with: hidden times W^T M, without the logits."""
    narrow = type(other) in (Tensor, torch.nn.Parameter) and other.ndim == 2 and other.shape[1] < x.raw.features
    if not (_WITHIN_LAYER.get() and narrow and is_linear(x) and other.dtype == x.dtype) or len(other) != x.shape[-1]:
        return NotImplemented
    stored = not isinstance(x.raw.weight, Tensor) and x.raw.adapter is x.raw.gain is None
    if stored or x.device != x.hidden.device:
        return NotImplemented

    def compute(hidden: Tensor, raw: Head) -> Tensor:
        head = x.recipe.head(raw).joined()
        weight: Any = head.weight
        product = hidden.to(x.dtype) @ (weight.to(x.dtype).T @ other)
        return (product if head.bias is None else product + head.bias.to(x.dtype) @ other) * head.scale

    return x.with_raw(compute)


def _tanh(x: LazyLogits) -> Any:
    if x.recipe.outer is not None or x.recipe.log_probs:
        return NotImplemented
    return x.derived(recipe=replace(x.recipe, outer=1.0))


_T = torch.Tensor
_RULES: dict[Any, Any] = {
    **dict.fromkeys((_T.add, _T.__add__, _T.__radd__, torch.add), _add),
    **dict.fromkeys((_T.add_, _T.__iadd__), _add_in_place),
    **dict.fromkeys((_T.sub, _T.__sub__, torch.sub, torch.subtract), _subtract),
    **dict.fromkeys((_T.mul, _T.__mul__, _T.__rmul__, torch.mul, torch.multiply), _multiply),
    **dict.fromkeys((_T.div, _T.__truediv__, torch.div, torch.true_divide), _divide),
    **dict.fromkeys((_T.neg, _T.__neg__, torch.neg, torch.negative), _negative),
    **dict.fromkeys((_T.tanh, torch.tanh), _tanh),
    **dict.fromkeys((_T.matmul, _T.__matmul__, torch.matmul), _matmul),
    torch.zeros_like: _zeros_like,
}
register(_RULES)

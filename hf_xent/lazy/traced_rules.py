"""What is recorded of traced logits, and what is computed of them without their values, while torch traces a model.

Each rule falls back to the dense tensor, which then is part of the compiled program. They are plainer than the rules of
`LazyLogits`: a compiled program has no views whose memory someone could write to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import Stats
from ..ops.dispatch import stream_stats
from ..ops.rows import FLOATS
from . import consumers  # noqa: F401  it registers the rule for F.cross_entropy
from .answers import ANSWERS
from .traced import METHODS, RULES, TracedLogits, dense

_OF_LAZY_LOGITS = ANSWERS[F.cross_entropy].rule


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def multiply(x: TracedLogits, other: Any) -> Any:
    """The product with a number; with a tensor it is dense."""
    if x.values is not None or x.recipe.log_probs or not _is_number(other) or not 1e-30 < abs(other) < 1e30:
        return x.dense() * dense(other)
    return x.derived(recipe=x.recipe.times(other))


def divide(x: TracedLogits, other: Any) -> Any:
    """The quotient by a number; by a tensor it is dense."""
    return multiply(x, 1 / other) if _is_number(other) and other != 0 else x.dense() / dense(other)


def add(x: TracedLogits, other: Any) -> Any:
    """The sum with a bias over the vocabulary, or with the product of a LoRA branch."""
    if x.values is None and x.recipe.outer is None and not x.recipe.log_probs:
        if isinstance(other, TracedLogits):
            total = _sum_of_products(x, other)
            return x.dense() + other.dense() if total is None else total
        if isinstance(other, Tensor) and 0 < other.ndim <= x.ndim and other.numel() == other.shape[-1] == x.raw.size:
            bias = (other.reshape(-1) / x.recipe.inner).to(x.raw.weight.dtype)
            return x.derived(raw=replace(x.raw, bias=bias if x.raw.bias is None else x.raw.bias + bias))
    return x.dense() + dense(other)


def _sum_of_products(x: TracedLogits, y: TracedLogits) -> TracedLogits | None:
    """The sum of a head's product and that of its LoRA branch, as one product of the concatenated inputs."""
    big, small = (x, y) if x.raw.weight.shape[1] >= y.raw.weight.shape[1] else (y, x)
    nonlinear = y.recipe.outer is not None or y.recipe.log_probs
    if y.values is not None or nonlinear or small.raw.bias is not None or small.raw.adapter is not None:
        return None
    dtype = big.hidden.dtype
    ratio = small.recipe.inner / big.recipe.inner
    hidden = torch.cat([big.hidden, (small.hidden * ratio).to(dtype)], -1)
    adapter: Any = small.raw.weight.to(dtype)
    if big.raw.adapter is not None:
        adapter = torch.cat([big.raw.adapter, adapter], 1)
    return big.derived(hidden=hidden, raw=replace(big.raw, adapter=adapter))


def take_tanh(x: TracedLogits) -> Any:
    """The start of a softcap."""
    if x.values is not None or x.recipe.outer is not None or x.recipe.log_probs:
        return x.dense().tanh()
    return x.derived(recipe=replace(x.recipe, outer=1.0))


def cast(x: TracedLogits, *args: Any, **kwargs: Any) -> Any:
    """`.to` with a dtype, and with the device where the logits are."""
    given = (*args, *kwargs.values())
    dtypes = [a for a in given if isinstance(a, torch.dtype)]
    if x.values is not None or not all(a in FLOATS if isinstance(a, torch.dtype) else a == x.device for a in given):
        return x.dense().to(*args, **kwargs)
    return x.derived(dtype=dtypes[0]) if dtypes else x


def reshape(x: TracedLogits, *shape: Any) -> Any:
    """Other row dimensions, with the vocabulary last."""
    sizes = shape if len(shape) > 1 or isinstance(shape[0], int) else shape[0]
    if x.values is not None or sizes[-1] != x.raw.size:
        return x.dense().reshape(sizes)
    return x.derived(hidden=x.hidden.reshape(*sizes[:-1], x.hidden.shape[-1]))


def flatten(x: TracedLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Row dimensions flattened."""
    end = end_dim % x.ndim
    if x.values is not None or end == x.ndim - 1:
        return x.dense().flatten(start_dim, end_dim)
    return x.derived(hidden=x.hidden.flatten(start_dim, end))


def take(x: TracedLogits, index: Any) -> Any:
    """Rows by an index, and a slice of the vocabulary."""
    index = index if isinstance(index, tuple) else (index,)
    consumed = sum(1 for i in index if i is not None and i is not ...)
    reaches_vocabulary = consumed == x.ndim or (any(i is ... for i in index) and index[-1] is not ...)
    part = index[-1] if reaches_vocabulary else slice(None)
    masks = any(isinstance(i, Tensor) and i.ndim > 1 for i in index)
    if x.values is not None or masks or not isinstance(part, slice) or (x.recipe.log_probs and part != slice(None)):
        return x.dense()[index]
    rows = (*index[:-1], slice(None)) if reaches_vocabulary else index
    return x.derived(hidden=x.hidden[rows], raw=x.raw if part == slice(None) else x.raw[part])


def log_softmax(x: TracedLogits, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    """Log-probabilities, of which one per row may be gathered."""
    dtype = _stacklevel if isinstance(_stacklevel, torch.dtype) else dtype or x.dtype
    if x.values is not None or x.recipe.log_probs or not is_last(x, dim):
        return F.log_softmax(x.dense(), dim, dtype=dtype)
    return x.derived(recipe=replace(x.recipe, log_probs=True), dtype=dtype)


def gather(x: TracedLogits, dim: int, index: Tensor) -> Any:
    """One column per row: the label's logit, or its log-probability."""
    if x.values is not None or not is_last(x, dim) or index.shape != (*x.shape[:-1], 1):
        return x.dense().gather(dim, index)
    stats = _stats(x, index.squeeze(-1), ("lse", "target"))
    return (stats.logp if x.recipe.log_probs else stats.target).to(x.dtype).unsqueeze(-1)


def logsumexp(x: TracedLogits, dim: Any, keepdim: bool = False) -> Any:
    """The normalizer."""
    if x.values is not None or x.recipe.log_probs or not is_last(x, dim):
        return x.dense().logsumexp(dim, keepdim)
    lse = _stats(x, None, ("lse",)).lse.to(x.dtype)
    return lse.unsqueeze(-1) if keepdim else lse


def argmax(x: TracedLogits, dim: Any = None, keepdim: bool = False) -> Any:
    """The token with the largest logit."""
    if x.values is not None or not is_last(x, dim):
        return x.dense().argmax(dim, keepdim)
    with torch.no_grad():
        top = _stats(x, None, ("top",)).top
    return top.unsqueeze(-1) if keepdim else top


def is_last(x: TracedLogits, dim: Any) -> bool:
    """Whether a dimension is the vocabulary's."""
    return isinstance(dim, int) and dim % x.ndim == x.ndim - 1


def _stats(x: TracedLogits, labels: Tensor | None, outputs: tuple[str, ...]) -> Stats:
    """Statistics at all positions."""
    if labels is None:
        labels = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
    return stream_stats(x.hidden, x.head, labels, outputs, replace(x.state.request, ignore_index=-(2**31)))


def cross_entropy(x: TracedLogits, target: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`F.cross_entropy` of [N, V] and class indices, by the rule of `LazyLogits`."""
    found = NotImplemented if x.values is not None else _OF_LAZY_LOGITS(x, target, *args, **kwargs)
    return F.cross_entropy(x.dense(), target, *args, **kwargs) if found is NotImplemented else found


def nll_loss(x: TracedLogits, target: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`F.nll_loss` of log-probabilities."""
    if x.values is None and x.recipe.log_probs:
        return cross_entropy(x, target, *args, **kwargs)
    return F.nll_loss(x.dense(), target, *args, **kwargs)


_METHODS: dict[str, Callable[..., Any]] = {
    "float": lambda x: cast(x, torch.float32),
    "double": lambda x: cast(x, torch.float64),
    "half": lambda x: cast(x, torch.float16),
    "bfloat16": lambda x: cast(x, torch.bfloat16),
    **{"to": cast, "type": cast, "mul": multiply, "div": divide, "add": add, "tanh": take_tanh, "reshape": reshape},
    **{"view": reshape, "flatten": flatten, "log_softmax": log_softmax, "gather": gather, "logsumexp": logsumexp},
    **{"argmax": argmax, "__getitem__": take},
}
_FUNCTIONS = ("mul", "div", "add", "tanh", "reshape", "flatten", "log_softmax", "gather", "logsumexp", "argmax")
METHODS.update(_METHODS)
RULES.update({getattr(torch, name): _METHODS[name] for name in _FUNCTIONS})
RULES.update({F.log_softmax: log_softmax, F.cross_entropy: cross_entropy, F.nll_loss: nll_loss})

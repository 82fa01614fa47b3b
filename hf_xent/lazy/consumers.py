"""Rules for the functions that end in a few floats per token: losses, gather, logsumexp and argmax, without logits.

Each rule returns the result, or NotImplemented: then torch's function is applied to the dense tensor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..losses.cross_entropy import CrossEntropy
from ..losses.reduction import Reduction
from ..ops import Head, Stats
from ..ops.dispatch import stream_stats
from ..ops.rows import token_ids
from .answers import register
from .objective import loss_of
from .shapes import canonical_dim
from .tensor import LazyLogits
from .weighting import weigh


def _cross_entropy(  # noqa: PLR0913  the arguments are F.cross_entropy's
    x: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """`F.cross_entropy` of [N, V] and class indices; 0, not NaN, if every label is ignored, since DDP averages it.

    While a patched model is called, the loss that it is patched with takes its place.
    """
    indices = (
        isinstance(target, Tensor) and not target.is_floating_point() and x.ndim == 2 and target.shape == x.shape[:1]
    )
    if not indices or size_average is not None or reduce is not None or not 0 <= label_smoothing < 1:
        return NotImplemented
    if weight is not None and not _has_weight_per_class(weight, x):
        return NotImplemented
    target, token_weight = weigh(x.state, token_ids(target.to(x.hidden.device)), ignore_index)
    request = replace(x.state.request, ignore_index=ignore_index)
    plain = CrossEntropy.like_torch(weight, label_smoothing)
    loss, rows = loss_of(x, plain)
    if weight is not None and loss is not plain:
        of_classes = weight.to(target.device)[torch.where(target == ignore_index, 0, target)]
        token_weight = of_classes if token_weight is None else of_classes * token_weight

    def compute(hidden: Tensor, head: Head) -> tuple[Tensor, Stats]:
        weights = None if token_weight is None else token_weight.to(hidden.device).reshape(rows)
        reduce, labels = Reduction(reduction, token_weight=weights), target.to(hidden.device).reshape(rows)
        return loss.reduced(hidden.reshape(*rows, -1), head, labels, request, reduce)

    value, stats = x.with_head(compute)
    value = x.state.counted(value, stats)
    return value.reshape(target.shape if reduction == "none" else ()).to(x.device, x.dtype)


def _has_weight_per_class(weight: Any, x: LazyLogits) -> bool:
    """Whether weights are one constant number for each token of the vocabulary, where torch would accept them."""
    constant = isinstance(weight, Tensor) and not weight.requires_grad and weight.is_floating_point()
    return constant and weight.shape == x.shape[-1:] and weight.device == x.device


def _nll_loss(x: LazyLogits, target: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`F.nll_loss` of log-probabilities is the cross-entropy of their logits (its arguments come in the same order)."""
    return _cross_entropy(x, target, *args, **kwargs) if x.recipe.log_probs else NotImplemented


def _log_softmax(
    x: LazyLogits,
    dim: int | None = None,
    _stacklevel: Any = 3,  # of F.log_softmax; in the same canonical_dim torch.log_softmax has its dtype
    dtype: torch.dtype | None = None,
) -> Any:
    dtype = _stacklevel if isinstance(_stacklevel, torch.dtype) else dtype or x.dtype
    if not _is_last(x, dim) or x.recipe.log_probs or not dtype.is_floating_point:
        return NotImplemented
    return x.derived(recipe=replace(x.recipe, log_probs=True), dtype=dtype, layout=None)


def _gather(x: LazyLogits, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    """One column per row: the label's logit, or its log-probability."""
    is_column = isinstance(index, Tensor) and index.shape == (*x.shape[:-1], 1) and index.dtype == torch.int64
    if sparse_grad or not is_column or not _is_last(x, dim) or not _are_tokens(index, x.shape[-1]):
        return NotImplemented
    stats = _scalar_stats(x, index.squeeze(-1), ("lse", "target"))
    value = stats.logp if x.recipe.log_probs else stats.target
    return value.to(x.dtype, copy=True).unsqueeze(-1)  # a copy, since statistics are saved for the backward


def _logsumexp(x: LazyLogits, dim: Any, keepdim: bool = False) -> Any:
    if not _is_last(x, dim) or x.recipe.log_probs:
        return NotImplemented
    lse = _scalar_stats(x, None, ("lse",)).lse.to(x.dtype, copy=True)
    return lse.unsqueeze(-1) if keepdim else lse


def _argmax(x: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    if not _is_last(x, dim):
        return NotImplemented
    with torch.no_grad():
        top = _scalar_stats(x.detached(), None, ("top",)).top
    return top.unsqueeze(-1) if keepdim else top


def _are_tokens(index: Tensor, size: int) -> bool:
    """Whether indices are in range; checked on a CPU only, since elsewhere torch raises nothing and reading is slow."""
    return index.device.type != "cpu" or not index.numel() or bool((index.min() >= 0) & (index.max() < size))


def _is_last(x: LazyLogits, dim: Any) -> bool:
    return canonical_dim(x, dim) == x.ndim - 1


def _scalar_stats(x: LazyLogits, labels: Tensor | None, outputs: tuple[str, ...]) -> Stats:
    request = replace(x.state.request, ignore_index=-(2**31))
    x.state.streamed += 1

    def compute(hidden: Tensor, head: Head) -> Stats:
        ids = torch.zeros(x.shape[:-1], dtype=torch.int64) if labels is None else labels
        return stream_stats(hidden, head, ids.to(hidden.device), outputs, request)

    return x.with_head(compute).to(x.device)


_T = torch.Tensor
_RULES: dict[Any, Any] = {
    **dict.fromkeys((_T.log_softmax, torch.log_softmax, F.log_softmax), _log_softmax),
    **dict.fromkeys((_T.gather, torch.gather), _gather),
    **dict.fromkeys((_T.logsumexp, torch.logsumexp), _logsumexp),
    **dict.fromkeys((_T.argmax, torch.argmax), _argmax),
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll_loss,
}
register(_RULES)

"""What answers without logits: consumers that need a few floats a token.

Each returns the answer, or NotImplemented to have the dense tensor asked instead.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..losses import CrossEntropy
from ..ops import Stats, vocab_stats
from .shapes import derive, detach
from .tensor import ANSWERS, LazyLogits


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
    """`F.cross_entropy` of [N, V] and class indices; 0 (not NaN) where every label is ignored, for DDP's sake."""
    indices = (
        isinstance(target, Tensor) and not target.is_floating_point() and x.ndim == 2 and target.shape == x.shape[:1]
    )
    if not indices or size_average is not None or reduce is not None or (weight is not None and label_smoothing):
        return NotImplemented
    target = target.to(x.hidden.device)
    token_weight = None if weight is None else weight.to(target.device)[torch.where(target == ignore_index, 0, target)]
    loss, stats = CrossEntropy(label_smoothing=label_smoothing).compute(
        x.hidden,
        x.head,
        target,
        reduction=reduction,
        token_weight=token_weight,
        ignore_index=ignore_index,
        observe=x.seam.observe,
        tail=x.seam.tail,
        **x.seam.options,
    )
    x.seam.record(stats)
    return loss.to(x.device, x.dtype)


def _nll_loss(x: LazyLogits, target: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`F.nll_loss` of log-probabilities is the cross-entropy of their logits (its arguments come in the same order)."""
    return _cross_entropy(x, target, *args, **kwargs) if x.recipe.log_probs else NotImplemented


def _log_softmax(
    x: LazyLogits,
    dim: int | None = None,
    _stacklevel: int = 3,
    dtype: torch.dtype | None = None,
) -> Any:
    if dim is None or dim % x.ndim != x.ndim - 1 or x.recipe.log_probs:
        return NotImplemented
    return derive(x, recipe=replace(x.recipe, log_probs=True), dtype=dtype or x.dtype)


def _gather(x: LazyLogits, dim: int, index: Tensor, **kwargs: Any) -> Any:
    """One column a row: the label's logit, or its log-probability."""
    if kwargs or dim % x.ndim != x.ndim - 1 or index.shape != (*x.shape[:-1], 1):
        return NotImplemented
    stats = _scalar_stats(x, index.squeeze(-1), ("lse", "target"))
    return (stats.logp if x.recipe.log_probs else stats.target).unsqueeze(-1).to(x.dtype)


def _logsumexp(x: LazyLogits, dim: Any, keepdim: bool = False) -> Any:
    if not isinstance(dim, int) or dim % x.ndim != x.ndim - 1 or x.recipe.log_probs:
        return NotImplemented
    lse = _scalar_stats(x, None, ("lse",)).lse.to(x.dtype)
    return lse.unsqueeze(-1) if keepdim else lse


def _argmax(x: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    if not isinstance(dim, int) or dim % x.ndim != x.ndim - 1:
        return NotImplemented
    top = _scalar_stats(detach(x), None, ("top",)).top
    return top.unsqueeze(-1) if keepdim else top


def _scalar_stats(x: LazyLogits, labels: Tensor | None, outputs: tuple[str, ...]) -> Stats:
    if labels is None:
        labels = torch.zeros(x.shape[:-1], dtype=torch.int64)
    x.seam.streamed += 1
    labels, options = labels.to(x.hidden.device), x.seam.options
    return vocab_stats(x.hidden, x.head, labels, outputs=outputs, ignore_index=-(2**31), **options).to(x.device)


_T = torch.Tensor
ANSWERS.update(
    {
        **dict.fromkeys((_T.log_softmax, torch.log_softmax, F.log_softmax), _log_softmax),
        **dict.fromkeys((_T.gather, torch.gather), _gather),
        **dict.fromkeys((_T.logsumexp, torch.logsumexp), _logsumexp),
        **dict.fromkeys((_T.argmax, torch.argmax), _argmax),
        F.cross_entropy: _cross_entropy,
        F.nll_loss: _nll_loss,
    }
)

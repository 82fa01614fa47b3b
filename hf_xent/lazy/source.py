"""Heads whose weight is there only during their call: what is computed from their logits is computed in such a call.

ZeRO-3, FSDP and offloading gather a layer's weight when it is called and free it when the call ends. Lazy logits of
such a head have no weight, but a source: a function that calls the layer again and runs a computation within that call,
`source(hidden, compute) = compute(hidden, head)`. So the hooks of the library gather the weight for the computation,
and, since they see its results as the output of the layer, for its backward. `raw` has meta tensors in place of the
weights then: their shapes, and whether they train.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import Head, Stats

Compute = Callable[[Tensor, Head], Any]
Source = Callable[[Tensor, Compute], Any]
"""Runs a computation of hidden states and the head where the weights are; both may come in another dtype."""


def changed(source: Source | None, change: Callable[[Head], Head]) -> Source | None:
    """The source of a head that is a function of this source's; None for a head that is there."""
    if source is None:
        return None
    return lambda hidden, compute: source(hidden, lambda hidden, raw: compute(hidden, change(raw)))


def join(
    first: tuple[Source | None, Head],
    second: tuple[Source | None, Head],
    pair: Callable[[Tensor, Head, Tensor, Head], tuple[Tensor, Head]],
    split: int,
) -> Source | None:
    """The source of a head that is made of two; None if both are there.

    `pair` makes the hidden states and the head from those of both. The first `split` features of the hidden states
    that the source is called with are the first head's. One is called within the call of the other.
    """
    if first[0] is None and second[0] is None:
        return None
    outer, inner = (source or _present(raw) for source, raw in (first, second))

    def source(hidden: Tensor, compute: Compute) -> Any:
        def with_first(one: Tensor, raw: Head) -> Any:
            return inner(hidden[..., split:], lambda two, other: compute(*pair(one, raw, two, other)))

        return outer(hidden[..., :split], with_first)

    return source


def _present(raw: Head) -> Source:
    """The source of a head that is there."""
    return lambda hidden, compute: compute(hidden, raw)


def shape_of(raw: Head) -> Head:
    """The head with meta tensors in place of its weights."""

    def empty(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device="meta", requires_grad=x.requires_grad)

    return map_tensors(empty, raw)


def copied(hidden: Tensor, raw: Head) -> Head:
    """A computation: a copy of the head that outlives the call, and through which gradients reach it."""
    return map_tensors(torch.clone, raw)


def map_tensors(change: Callable[[Tensor], Tensor], result: Any) -> Any:
    """The result of a computation with each tensor changed: tensors, statistics, heads, tuples and lists of them."""
    if isinstance(result, Tensor):
        return change(result)
    if isinstance(result, Stats):
        return Stats({name: change(value) for name, value in result.values.items()}, result.labels, result.mask)
    if isinstance(result, Head):
        return result.with_tensors(*(None if x is None else change(x) for x in result.tensors.values()))
    return type(result)(map_tensors(change, x) for x in result) if isinstance(result, (tuple, list)) else result

"""Streaming inside `torch.compile`: three operators that the compiler takes as they are, with their gradients.

    hf_xent::stats            statistics in the shape of labels; any differentiable computation may follow
    hf_xent::stats_backward   the gradients of the operands from those of the statistics
    hf_xent::linear_loss      a sum that is linear in the statistics, with its gradients in the same visit

Here are their shapes, their gradients, and what calls them while torch traces; `dispatch` implements them with the same
backends that run without the compiler. A loss that is linear in its statistics (cross-entropy, with or without
smoothing) takes three matmuls, as it does elsewhere. Of any other loss of statistics the compiler traces `of`, which it
can fuse, and the backward computes the logits again: four matmuls.

The operators take and return tensors of all positions, also of those without a label, since only shapes are known while
tracing; inside, the valid rows alone are visited. Their number is read on the host, so that no operator can be part of
a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .head import Head, Payload
from .problem import TENSORS
from .request import Request
from .rows import autocast, autocast_head
from .statistics import FORWARD_ONLY, STATISTICS, Stats, wide

_INTEGERS = ("top", "rank")
SLOPED = ("lse", "target", "mean")
"""The statistics in which a loss can be linear, in the order of an operator's `slopes`."""
_OPERANDS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? adapter, Tensor? payload_hidden, Tensor? payload_weight,"
    " Tensor? payload_bias, Tensor labels, float scale, float? softcap, float payload_scale, float? payload_softcap,"
    " int ignore_index, str? impl, int? memory_budget, str[] outputs"
)
LIBRARY = torch.library.Library("hf_xent", "DEF")
_TAGS = (torch.Tag.cudagraph_unsafe, torch.Tag.needs_fixed_stride_order)
LIBRARY.define(f"stats({_OPERANDS}) -> Tensor[]", tags=_TAGS)
LIBRARY.define(f"stats_backward({_OPERANDS}, Tensor[] values, Tensor?[] upstream, str[] needs) -> Tensor[]", tags=_TAGS)
LIBRARY.define(
    f"linear_loss({_OPERANDS}, Tensor token_weight, float[] slopes, float tail, str[] needs)"
    " -> (Tensor, Tensor, Tensor[], Tensor[])",
    tags=_TAGS,
)
Operands = tuple[Tensor, Head, Tensor, Payload | None, Request, list[str]]


def pack(
    hidden: Tensor, head: Head, labels: Tensor, payload: Payload | None, request: Request, outputs: list[str]
) -> tuple[Any, ...]:
    """The arguments that all operators begin with."""
    other_hidden, other = (None, None) if payload is None else (payload[0], payload[1].joined())
    return (
        *(hidden, head.weight, head.bias, head.adapter),
        *(other_hidden, None if other is None else other.weight, None if other is None else other.bias),
        *(labels, head.scale, head.softcap),
        *(1.0 if other is None else other.scale, None if other is None else other.softcap),
        *(request.ignore_index, request.impl, request.memory_budget, outputs),
    )


def unpack(arguments: tuple[Any, ...]) -> Operands:
    """The operands from the arguments that `pack` makes."""
    hidden, weight, bias, adapter, *other, labels, scale, softcap = arguments[:10]
    other_scale, other_softcap, ignore_index, impl, memory_budget, outputs = arguments[10:16]
    head = Head(weight, bias, scale, softcap, adapter)
    payload = None if other[0] is None else (other[0], Head(other[1], other[2], other_scale, other_softcap))
    request = Request(ignore_index=ignore_index, impl=impl, memory_budget=memory_budget)
    return hidden, head, labels, payload, request, outputs


def stats(
    hidden: Tensor, head: Head, labels: Tensor, outputs: tuple[str, ...], request: Request, payload: Payload | None
) -> Stats:
    """`dispatch.stream_stats` while torch traces."""
    arguments = _arguments(hidden, head, labels, outputs, request, payload)
    values = dict(zip(arguments[-1], torch.ops.hf_xent.stats(*arguments), strict=True))
    values = {name: value.detach() if name in FORWARD_ONLY else value for name, value in values.items()}
    return Stats(values, labels, labels != request.ignore_index)


def loss_sum(
    loss: Any,
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    request: Request,
    token_weight: Tensor | float,
    payload: Payload | None,
) -> tuple[Tensor, Stats]:
    """`dispatch.stream_loss` while torch traces."""
    outputs = (*loss.uses, *request.observe)
    if isinstance(token_weight, Tensor):
        weight = token_weight.expand(labels.shape)
    else:
        weight = hidden.new_full(labels.shape, token_weight, dtype=wide(hidden.dtype))
    arguments = _arguments(hidden, head, labels, outputs, request, payload)
    needs = [name for name, x in zip(TENSORS, arguments, strict=False) if x is not None and x.requires_grad]
    if getattr(loss, "linear", False) and needs and torch.is_grad_enabled() and not request.unreduced:
        slopes = _slopes(loss)
        total, _, values, _ = torch.ops.hf_xent.linear_loss(*arguments, weight, slopes, request.tail, needs)
        by_name = {name: value.detach() for name, value in zip(arguments[-1], values, strict=True)}
        by_name["loss"] = sum(slope * by_name[name] for name, slope in zip(SLOPED, slopes, strict=True) if slope)
        return total, Stats(by_name, labels, labels != request.ignore_index)
    if request.tail and needs:
        raise ValueError(
            f"tail is {request.tail} but {type(loss).__name__} is compiled, and only losses that are linear in log p"
            " (cross-entropy) have a sparse gradient then: pass tail=0, or compute the loss outside of torch.compile"
        )
    found = stats(hidden, head, labels, outputs, request, payload)
    losses = torch.where(found.mask, loss.of(_with_uniform_rows(found, head.vocabulary)), 0.0)
    weighted = torch.where(found.mask, losses * weight, 0.0)
    detached = found.detach()
    detached.values["loss"] = losses.detach()
    return weighted if request.unreduced else weighted.sum(), detached


def _with_uniform_rows(stats: Stats, vocabulary: int) -> Stats:
    """Statistics with those of a uniform softmax at positions without a label.

    They are finite in every loss, where zeros, which belong to no softmax, may have an infinite gradient: times the
    zero that comes back from an ignored position, that would be NaN.
    """
    nats = math.log(vocabulary)
    uniform = {"lse": nats, "entropy": nats, "log_sum_sq": -nats}
    values = {name: torch.where(stats.mask, x, uniform.get(name, 0)) for name, x in stats.values.items()}
    return Stats(values, torch.where(stats.mask, stats.labels, 0), stats.mask)


def _arguments(
    hidden: Tensor, head: Head, labels: Tensor, outputs: tuple[str, ...], request: Request, payload: Payload | None
) -> tuple[Any, ...]:
    """The arguments of an operator, cast as torch.autocast would: the compiler runs operators without it."""
    if head.shard is not None:
        raise ValueError("the head is split over ranks, which torch.compile does not trace: leave the loss uncompiled")
    if request.impl_name == "reference":
        raise ValueError(
            "impl is 'reference', whose gradients are autograd's own, and torch.compile does not trace them: choose"
            " 'chunked' or 'triton'"
        )
    if request.impl_name != "chunked":
        head = head.joined()  # it takes a single matrix
    if payload is not None:
        payload = (autocast(payload[0]), autocast_head(payload[1], payload[0]))
    wanted = {"lse", "target", *outputs} | ({"entropy"} if "variance" in outputs else set())
    names = [name for name in STATISTICS if name in wanted]
    return pack(autocast(hidden), autocast_head(head, hidden), labels, payload, request, names)


def _slopes(loss: Any) -> list[float]:
    """The derivative of a linear loss by each statistic of SLOPED: its value where that one is 1 and the others 0."""
    labels: Any = None  # a linear loss does not read them
    units: Any = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    return [float(loss.of(Stats(dict(zip(SLOPED, unit, strict=True)), labels, labels))) for unit in units]


def _fake_stats(*arguments: Any) -> list[Tensor]:
    """The shapes of `stats`."""
    hidden, labels, outputs = arguments[0], arguments[7], arguments[15]
    dtypes = (torch.int64 if name in _INTEGERS else wide(hidden.dtype) for name in outputs)
    return [labels.new_empty(labels.shape, dtype=dtype) for dtype in dtypes]


def _fake_gradients(arguments: tuple[Any, ...], needs: list[str]) -> list[Tensor]:
    tensors = dict(zip(TENSORS, arguments, strict=False))
    return [tensors[name].new_empty(tensors[name].shape) for name in needs]


def _fake_stats_backward(*arguments: Any) -> list[Tensor]:
    """The shapes of `stats_backward`."""
    return _fake_gradients(arguments, arguments[-1])


def _fake_linear_loss(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The shapes of `linear_loss`: the sum, what its gradients are divided by, statistics, gradients."""
    total, unit = (arguments[0].new_empty((), dtype=wide(arguments[0].dtype)) for _ in range(2))
    return total, unit, _fake_stats(*arguments), _fake_gradients(arguments, arguments[-1])


def _save_stats(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)  # statistics without an upstream gradient cost the backward nothing
    ctx.options = inputs[8:]
    ctx.save_for_backward(*inputs[:8], *output)


def _stats_gradients(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    operands, values = ctx.saved_tensors[:8], list(ctx.saved_tensors[8:])
    needs = [name for name, need in zip(TENSORS, ctx.needs_input_grad, strict=False) if need]
    upstream = [None if name in FORWARD_ONLY else g for name, g in zip(ctx.options[-1], upstream, strict=True)]
    grads = torch.ops.hf_xent.stats_backward(*operands, *ctx.options, values, upstream, needs)
    found = dict(zip(needs, grads, strict=True))
    return *(found.get(name) for name in TENSORS), *(None for _ in range(9))


def _save_linear_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    _, unit, _, grads = output
    ctx.needs = inputs[-1]
    ctx.save_for_backward(unit, *grads)


def _linear_loss_gradients(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    unit, *grads = ctx.saved_tensors
    if upstream is None:
        return (None,) * 20
    factor = upstream * unit
    found = {name: (g * factor).to(g.dtype) for name, g in zip(ctx.needs, grads, strict=True)}
    return *(found.get(name) for name in TENSORS), *(None for _ in range(13))


for _name, _fake in (
    ("stats", _fake_stats),
    ("stats_backward", _fake_stats_backward),
    ("linear_loss", _fake_linear_loss),
):
    torch.library.register_fake(f"hf_xent::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd("hf_xent::stats", _stats_gradients, setup_context=_save_stats, lib=LIBRARY)
torch.library.register_autograd(
    "hf_xent::linear_loss", _linear_loss_gradients, setup_context=_save_linear_loss, lib=LIBRARY
)

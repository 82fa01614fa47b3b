"""Streaming inside `torch.compile`: three operators that the compiler takes as they are, with their gradients.

    hf_xent::stats            statistics in the shape of labels; any differentiable computation may follow
    hf_xent::stats_backward   the gradients of the operands from those of the statistics
    hf_xent::linear_loss      a sum that is linear in the statistics, with its gradients in the same visit

Here are their shapes, their gradients, and what calls them while torch traces; `operators` implements them with the
same backends that run without the compiler. A loss that is linear in its statistics (cross-entropy, with or without
smoothing) takes three matmuls, as it does elsewhere. Of any other loss of statistics the compiler traces `of`, which it
can fuse, and the backward computes the logits again: four matmuls.

The operators take and return tensors of all positions, also of those without a label, since only shapes are known while
tracing; inside, the valid rows alone are visited. Their number is read on the host, so that no operator can be part of
a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .head import Head, Payload
from .problem import TENSORS
from .request import Request
from .rows import autocast_for, autocast_head
from .statistics import FORWARD_ONLY, STATISTICS, Stats, wide, with_needed

_INTEGERS = ("top", "rank")
_OPERANDS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? adapter, Tensor? gain, Tensor? payload_hidden,"
    " Tensor? payload_weight, Tensor? payload_bias, Tensor labels, Tensor? mean_weight, float scale, float? softcap,"
    " bool fp32, float payload_scale, float? payload_softcap, bool payload_fp32, int ignore_index, str? impl,"
    " int? memory_budget, str[] outputs"
)
COUNT = 20
"""How many arguments all operators begin with."""
_LABELS, _OUTPUTS = len(TENSORS), COUNT - 1  # positions among them
LIBRARY = torch.library.Library("hf_xent", "DEF")
_TAGS = (torch.Tag.cudagraph_unsafe, torch.Tag.needs_fixed_stride_order)
LIBRARY.define(f"stats({_OPERANDS}) -> Tensor[]", tags=_TAGS)
LIBRARY.define(f"stats_backward({_OPERANDS}, Tensor[] values, Tensor?[] upstream, str[] needs) -> Tensor[]", tags=_TAGS)
LIBRARY.define(
    f"linear_loss({_OPERANDS}, Tensor token_weight, Tensor[] slopes, float tail, str[] needs)"
    " -> (Tensor, Tensor, Tensor[], Tensor[])",
    tags=_TAGS,
)


@dataclass(frozen=True)
class Operands:
    """What every operator works on."""

    hidden: Tensor
    head: Head
    labels: Tensor
    payload: Payload | None
    request: Request
    mean_weight: Tensor | None
    outputs: list[str]

    @classmethod
    def of(cls, arguments: tuple[Any, ...]) -> Operands:
        """From the first arguments of an operator, which `_arguments` has put together."""
        hidden, *of_head, other, other_weight, other_bias = arguments[:_LABELS]
        labels, mean_weight, scale, softcap, fp32, *options = arguments[_LABELS:COUNT]
        other_scale, other_softcap, other_fp32, ignore_index, impl, memory_budget, outputs = options
        weight, bias, adapter, gain = of_head
        head = Head(weight, bias, scale, softcap, adapter, fp32=fp32, gain=gain)
        payload = None
        if other is not None:
            payload = (other, Head(other_weight, other_bias, other_scale, other_softcap, fp32=other_fp32))
        request = Request(ignore_index=ignore_index, impl=impl, memory_budget=memory_budget)
        return cls(hidden, head, labels, payload, request, mean_weight, outputs)


def stats(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    outputs: tuple[str, ...],
    request: Request,
    payload: Payload | None,
    mean_weight: Tensor | None = None,
) -> Stats:
    """`dispatch.stream_stats` while torch traces."""
    arguments = _arguments(hidden, head, labels, outputs, request, payload, mean_weight)
    values = dict(zip(arguments[_OUTPUTS], torch.ops.hf_xent.stats(*arguments), strict=True))
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
    outputs, mask, dtype = (*loss.uses, *request.observe), labels != request.ignore_index, wide(hidden.dtype)
    weight = torch.as_tensor(token_weight, dtype=dtype, device=labels.device).expand(labels.shape)
    mean_weight = getattr(loss, "class_weight", None) if "mean" in loss.uses else None
    if mean_weight is not None:
        mean_weight = mean_weight.to(labels.device, dtype)
    arguments = _arguments(hidden, head, labels, outputs, request, payload, mean_weight)
    tensors = arguments[: len(TENSORS)]
    needs = [name for name, x in zip(TENSORS, tensors, strict=True) if x is not None and x.requires_grad]
    if getattr(loss, "linear", False) and needs and torch.is_grad_enabled() and not request.unreduced:
        slopes = loss.slopes(torch.where(mask, labels, 0))
        each = [
            torch.as_tensor(slopes[name], dtype=dtype, device=labels.device).expand(labels.shape) for name in slopes
        ]
        total, _, found, _ = torch.ops.hf_xent.linear_loss(*arguments, weight, each, request.tail, needs)
        values = {name: value.detach() for name, value in zip(arguments[_OUTPUTS], found, strict=True)}
        values["loss"] = sum(slope * values[name] for name, slope in zip(slopes, each, strict=True))
        return total, Stats(values, labels, mask)
    if request.tail and needs:
        raise ValueError(
            f"tail is {request.tail} but {type(loss).__name__} is compiled, and only losses that are linear in log p"
            " (cross-entropy) have a sparse gradient then: pass tail=0, or compute the loss outside of torch.compile"
        )
    statistics = stats(hidden, head, labels, outputs, request, payload, mean_weight)
    losses = torch.where(mask, loss.of(_with_uniform_rows(statistics, head.vocabulary)), 0.0)
    weighted = torch.where(mask, losses * weight, 0.0)
    detached = statistics.detach()
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
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    outputs: tuple[str, ...],
    request: Request,
    payload: Payload | None,
    mean_weight: Tensor | None,
) -> tuple[Any, ...]:
    """The arguments of an operator, cast as torch.autocast would: the compiler runs operators without it."""
    if head.shard is not None or not isinstance(head.weight, Tensor):
        what = "split over ranks" if head.shard is not None else f"a {type(head.weight).__name__}"
        raise ValueError(f"the head's weight is {what}, which torch.compile does not trace: compute the loss outside")
    if request.impl_name == "reference":
        raise ValueError(
            "impl is 'reference', whose gradients are autograd's own, and torch.compile does not trace them: choose"
            " 'chunked' or 'triton'"
        )
    if request.impl_name != "chunked":
        head = head.joined()  # it takes a single matrix
    hidden, head = autocast_for(head, hidden), autocast_head(head, hidden)
    other, other_hidden = Head(hidden), None
    if payload is not None:
        other = autocast_head(payload[1], payload[0]).joined()
        other_hidden = autocast_for(other, payload[0])
    wanted = with_needed(outputs)
    return (
        *(hidden, *head.tensors.values()),
        *((None, None, None) if payload is None else (other_hidden, other.weight, other.bias)),
        *(labels, mean_weight, head.scale, head.softcap, head.fp32),
        *(other.scale, other.softcap, other.fp32),
        *(request.ignore_index, request.impl, request.memory_budget),
        [name for name in STATISTICS if name in wanted],
    )


def _fake_stats(*arguments: Any) -> list[Tensor]:
    """The shapes of `stats`."""
    labels, dtype = arguments[_LABELS], wide(arguments[0].dtype)
    dtypes = (torch.int64 if name in _INTEGERS else dtype for name in arguments[_OUTPUTS])
    return [labels.new_empty(labels.shape, dtype=dtype) for dtype in dtypes]


def _fake_stats_backward(*arguments: Any) -> list[Tensor]:
    """The shapes of `stats_backward`."""
    tensors = dict(zip(TENSORS, arguments, strict=False))
    return [tensors[name].new_empty(tensors[name].shape) for name in arguments[-1]]


def _fake_linear_loss(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The shapes of `linear_loss`: the sum, what its gradients are divided by, statistics, gradients."""
    total, unit = (arguments[0].new_empty((), dtype=wide(arguments[0].dtype)) for _ in range(2))
    return total, unit, _fake_stats(*arguments), _fake_stats_backward(*arguments)


def _save_stats(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)  # statistics without an upstream gradient cost the backward nothing
    ctx.options = inputs[_LABELS + 2 :]
    ctx.save_for_backward(*inputs[: _LABELS + 2], *output)


def _stats_gradients(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    operands, values = ctx.saved_tensors[: _LABELS + 2], list(ctx.saved_tensors[_LABELS + 2 :])
    needs = [name for name, need in zip(TENSORS, ctx.needs_input_grad, strict=False) if need]
    upstream = [None if name in FORWARD_ONLY else g for name, g in zip(ctx.options[-1], upstream, strict=True)]
    grads = torch.ops.hf_xent.stats_backward(*operands, *ctx.options, values, upstream, needs)
    found = dict(zip(needs, grads, strict=True))
    return *(found.get(name) for name in TENSORS), *[None] * (COUNT - len(TENSORS))


def _save_linear_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    _, unit, _, grads = output
    ctx.needs, ctx.slopes = inputs[-1], [None] * len(inputs[COUNT + 1])
    ctx.save_for_backward(unit, *grads)


def _linear_loss_gradients(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    unit, *grads = ctx.saved_tensors
    found = {}
    if upstream is not None:
        factor = upstream * unit
        found = {name: (g * factor).to(g.dtype) for name, g in zip(ctx.needs, grads, strict=True)}
    without = [None] * (COUNT - len(TENSORS))
    return *(found.get(name) for name in TENSORS), *without, None, ctx.slopes, None, None


for _name, _fake in {
    "stats": _fake_stats,
    "stats_backward": _fake_stats_backward,
    "linear_loss": _fake_linear_loss,
}.items():
    torch.library.register_fake(f"hf_xent::{_name}", _fake, lib=LIBRARY)
torch.library.register_autograd("hf_xent::stats", _stats_gradients, setup_context=_save_stats, lib=LIBRARY)
torch.library.register_autograd(
    "hf_xent::linear_loss", _linear_loss_gradients, setup_context=_save_linear_loss, lib=LIBRARY
)

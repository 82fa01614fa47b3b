"""The public door of floor 0: `vocab_stats` (any graph on top), `vocab_loss` (one visit for sums), `map_logits` (full rows).

Checks, autocast and the choice of tokens happen here once; backends see valid rows only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import chunked, reference
from .algebra import DIFFERENTIABLE, FORWARD_ONLY, STATISTICS, TENSORS, Head, Problem, Stats, wide

IMPLS = ("reference", "chunked", "triton")
Payload = tuple[Tensor, Head]


class TokenLoss(Protocol):
    """What `vocab_loss` asks of a loss: statistics it differentiates, and the per-token loss from them."""

    uses: tuple[str, ...]

    def of(self, stats: Stats) -> Tensor:  # [N], nats
        ...


def vocab_stats(
    hidden: Tensor,  # [..., D]
    head: Head,
    labels: Tensor,  # [...]
    *,
    outputs: tuple[str, ...] = ("lse", "target", "entropy", "top"),
    payload: Payload | None = None,  # ([..., D2], head of the same V)
    ignore_index: int = -100,
    impl: str | None = None,
    memory_budget: int | None = None,
) -> Stats:
    """Every token's softmax reduced to a handful of differentiable floats; no [tokens, vocabulary] tensor is kept.

    Gradients reach hidden, the head and the payload (mode *recompute*: four matmuls in all, composes with any graph).
    `payload=(hidden2, head2)` adds the expectation of a second head's logits under the first head's softmax.
    `memory_budget` bounds the bytes of logits alive at a time (default: an eighth of the head, at least 24 MiB).
    `impl` is 'reference', 'chunked' or 'triton' (default: the environment's HF_XENT_IMPL, else 'chunked').

    Returns: Stats shaped like labels; ignored positions hold 0.
    Raises: ValueError for shapes that do not fit, labels outside the vocabulary, unknown statistics.
    Source: the softmax is streamed as in Wijmans et al. 2024, Cut Your Losses, arXiv:2411.09009; the statistics and
    their common backward are this project's.
    """
    rows = _Rows(hidden, head, labels, ignore_index)
    backend = _backend(impl)
    problem = _problem(rows, outputs, payload, memory_budget)
    values = _run(backend, problem)
    return rows.scatter(values)


def vocab_loss(
    loss: TokenLoss,
    hidden: Tensor,  # [..., D]
    head: Head,
    labels: Tensor,  # [...]
    *,
    token_weight: Tensor | float = 1.0,  # [...] or one number; constant, no gradient
    observe: tuple[str, ...] = (),
    payload: Payload | None = None,
    unreduced: bool = False,
    ignore_index: int = -100,
    impl: str | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Stats]:
    """The sum `token_weight * loss.of(stats)` over all valid tokens, and detached statistics.

    Mode *eager*: gradients are taken while a chunk of logits is alive, three matmuls in all. `loss.of` sees the
    statistics in `loss.uses`, `observe` adds others to the returned Stats, which also holds each token's unweighted
    `loss`. With `unreduced` the weighted losses come in the shape of labels, 0 at ignored positions (mode *recompute*:
    their upstream gradients are not known yet). Other parameters, errors and source: `vocab_stats`.
    """
    rows = _Rows(hidden, head, labels, ignore_index)
    backend = _backend(impl)
    problem = _problem(rows, (*loss.uses, *observe), payload, memory_budget)
    weight = rows.select(token_weight) if isinstance(token_weight, Tensor) and token_weight.ndim else token_weight
    unit = _unit(weight, problem.hidden.dtype)
    values, per_token = {}, []

    def objective(chunk: slice, found: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: found[name].detach().requires_grad_() for name in loss.uses}
        with torch.enable_grad():
            loss_of = loss.of(Stats({**found, **leaves}, problem.labels[chunk], rows.ones[chunk]))
            total = (loss_of * (weight[chunk] if isinstance(weight, Tensor) and weight.ndim else weight) / unit).sum()
        per_token.append(loss_of.detach())
        if not total.requires_grad:  # a constant loss
            return {"lse": torch.zeros_like(found["lse"])}
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}

    if problem.needs and not unreduced:
        with _no_autocast(hidden):
            total, *tail = _VocabLoss.apply(
                backend, problem, objective, per_token, loss.uses, weight, unit, *problem.tensors
            )
        values = dict(zip(_order(problem), tail, strict=True))
        values["loss"] = torch.cat(per_token) if per_token else values["lse"]
    else:
        values = _run(backend, problem)
        values["loss"] = loss.of(Stats(values, problem.labels, rows.ones))
        weighted = values["loss"] * weight
        total = rows.scatter({"loss": weighted}).loss if unreduced else weighted.sum()
    return total, rows.scatter({name: value.detach() for name, value in values.items()})


def map_logits(
    fn: Callable[..., Tensor],
    hidden: Tensor,  # [N, D]
    head: Head,
    *rows: Tensor,  # [N, ...] each, handed to fn chunk by chunk
    memory_budget: int | None = None,
) -> Tensor:
    """`fn(logits, *rows)` over full rows of logits, chunk by chunk, recomputed in the backward; results concatenated.

    The way out for what is not a moment of the softmax (Jensen-Shannon, total variation, top-k). `fn` must keep the
    first dimension and may close over differentiable tensors.
    """
    _check_head(hidden, head)
    hidden, head = _autocast(hidden), _autocast_head(head, hidden)
    row = head.size * wide(hidden.dtype).itemsize * 4  # fn needs room of its own
    step = max(1, (memory_budget or default_budget(head)) // row)
    parts = []
    for i in range(0, max(1, len(hidden)), step):
        part = [x[i : i + step] for x in (hidden, *rows)]
        parts.append(checkpoint(lambda h, *r: fn(head.logits(h), *r), *part, use_reentrant=False))
    return torch.cat(parts)


def default_budget(head: Head) -> int:
    """Bytes of logits alive at a time: an eighth of the head's own, so that the buffer never stands out beside its gradient,
    at least 24 MiB on a CPU (128 float32 rows of a 49k vocabulary: below that its matmuls slow down) and 256 MiB elsewhere."""
    weight = head.weight
    return max((24 if weight.device.type == "cpu" else 256) << 20, weight.numel() * weight.element_size() // 8)


def _backend(impl: str | None) -> ModuleType:
    name = impl or os.environ.get("HF_XENT_IMPL") or "chunked"
    if name not in IMPLS:
        raise ValueError(f"impl is {name!r}: choose one of {', '.join(IMPLS)} (argument impl, or HF_XENT_IMPL)")
    if name == "triton":
        from . import streaming  # imported here: triton is optional

        return streaming
    return {"reference": reference, "chunked": chunked}[name]


class _Rows:
    """The valid tokens of one call: checked, flattened, compacted; and the way back to the labels' shape."""

    def __init__(self, hidden: Tensor, head: Head, labels: Tensor, ignore_index: int):
        _check_head(hidden, head)
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} but hidden {tuple(hidden.shape)}: pass one label per row of hidden,"
                f" {tuple(hidden.shape[:-1])}"
            )
        if labels.dtype.is_floating_point or labels.dtype == torch.bool:
            raise ValueError(f"labels is {labels.dtype}: pass token ids as int64")
        if labels.device != hidden.device:
            raise ValueError(f"labels is on {labels.device} but hidden on {hidden.device}: move one of them")
        self.labels = labels
        self.mask = labels != ignore_index
        flat = labels.reshape(-1)
        index = self.mask.reshape(-1).nonzero().squeeze(-1)
        self.index = None if len(index) == flat.numel() else index
        self.hidden = _autocast(self.select(hidden, trailing=1))
        self.head = _autocast_head(head, hidden)
        self.flat = self.select(labels).long()
        self.ones = torch.ones_like(self.flat, dtype=torch.bool)
        low, high = (int(self.flat.min()), int(self.flat.max())) if len(self.flat) else (0, 0)
        if low < 0 or high >= head.size:
            raise ValueError(
                f"labels range over [{low}, {high}] but the head has {head.size} tokens: pass ids in [0, {head.size - 1}],"
                f" or ignore_index={ignore_index} for positions without a label"
            )

    def select(self, x: Tensor, trailing: int = 0) -> Tensor:
        """Valid rows of a tensor shaped like labels (and `trailing` more dimensions)."""
        shape = x.shape[x.ndim - trailing :]
        if x.shape[: x.ndim - trailing] != self.labels.shape:
            raise ValueError(
                f"a per-token tensor has shape {tuple(x.shape)}: its rows must be shaped like labels, {tuple(self.labels.shape)}"
            )
        x = x.reshape(-1, *shape)
        return x if self.index is None else x.index_select(0, self.index)

    def scatter(self, values: Mapping[str, Tensor]) -> Stats:
        """Statistics in the labels' shape; ignored positions hold 0."""
        shape = self.labels.shape
        if self.index is None:
            return Stats({name: value.reshape(shape) for name, value in values.items()}, self.labels, self.mask)
        count = self.labels.numel()
        full = {name: value.new_zeros(count).index_copy(0, self.index, value) for name, value in values.items()}
        return Stats({name: value.reshape(shape) for name, value in full.items()}, self.labels, self.mask)


def _check_head(hidden: Tensor, head: Head) -> None:
    weight, bias = head.weight, head.bias
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: a head needs a non-empty [vocabulary, hidden] matrix"
            " (gather a sharded weight first)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: pass one value per row of weight, [{head.size}]")
    if head.softcap == 0:
        raise ValueError("softcap is 0: pass None for a head without a softcap")
    if hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}: its last dimension must be the head's hidden size, {weight.shape[1]}"
        )
    if hidden.device != weight.device:
        raise ValueError(f"hidden is on {hidden.device} but weight on {weight.device}: move one of them")
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(f"hidden is {hidden.dtype} but weight {weight.dtype}: cast one of them, or use torch.autocast")
    if bias is not None and bias.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(f"bias is {bias.dtype} but weight {weight.dtype}: cast one of them, or use torch.autocast")


def _autocast(x: Tensor) -> Tensor:
    """What torch.autocast would make of an operand of F.linear."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _autocast_head(head: Head, hidden: Tensor) -> Head:
    if not torch.is_autocast_enabled(hidden.device.type):
        return head
    return replace(head, weight=_autocast(head.weight), bias=None if head.bias is None else _autocast(head.bias))


def _no_autocast(hidden: Tensor) -> Any:
    return torch.autocast(hidden.device.type, enabled=False)


def _problem(rows: _Rows, outputs: tuple[str, ...], payload: Payload | None, memory_budget: int | None) -> Problem:
    unknown = sorted(set(outputs) - set(STATISTICS))
    if unknown:
        raise ValueError(f"outputs has {unknown[0]!r}: choose among {', '.join(STATISTICS)}")
    if ("payload" in outputs) != (payload is not None):
        raise ValueError(
            "outputs names 'payload' and payload=(hidden, head) is given only together: pass both or neither"
        )
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget is {memory_budget}: pass a positive number of bytes")
    ask = {"lse", "target", *outputs} | ({"entropy"} if "variance" in outputs else set())
    if payload is not None:
        payload = _payload(rows, payload)
    problem = Problem(
        hidden=rows.hidden.contiguous(),
        head=rows.head,
        labels=rows.flat,
        outputs=frozenset(ask),
        payload=payload,
        memory_budget=memory_budget or default_budget(rows.head),
    )
    wanted = torch.is_grad_enabled()
    needs = {
        name for name, t in zip(TENSORS, problem.tensors, strict=True) if wanted and t is not None and t.requires_grad
    }
    return replace(problem, needs=frozenset(needs))


def _payload(rows: _Rows, payload: Payload) -> Payload:
    hidden, head = payload
    _check_head(hidden, head)
    if hidden.device != rows.hidden.device:
        raise ValueError(f"payload is on {hidden.device} but hidden on {rows.hidden.device}: move one of them")
    if head.size != rows.head.size:
        raise ValueError(
            f"payload's head has {head.size} tokens but the head {rows.head.size}: both need the same vocabulary"
        )
    return _autocast(rows.select(hidden, trailing=1)).contiguous(), _autocast_head(head, hidden)


def _unit(weight: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """The largest token weight: what float16 gradients of mode eager are held in until a GradScaler's factor reaches them.

    Weights of 1 / (number of tokens) would push them below float16's range before they could be scaled up.
    """
    if dtype != torch.float16:
        return 1.0
    if not isinstance(weight, Tensor):
        return abs(weight) or 1.0
    largest = weight.detach().abs().amax() if weight.numel() else weight.new_ones(())
    return torch.where(largest == 0, 1.0, largest)


def _order(problem: Problem) -> list[str]:
    """Statistics as a Function returns them: differentiable ones first."""
    return [name for name in STATISTICS if name in problem.outputs]


def _run(backend: ModuleType, problem: Problem) -> dict[str, Tensor]:
    with _no_autocast(problem.hidden):
        if not problem.needs:
            with torch.no_grad():
                values = backend.forward(problem)
            return {name: values[name] for name in _order(problem)}
        found = _VocabStats.apply(backend, problem, *problem.tensors)
    return dict(zip(_order(problem), found, strict=True))


class _VocabStats(torch.autograd.Function):
    """Mode recompute: nothing but the inputs and the statistics is kept."""

    @staticmethod
    def forward(ctx: Any, backend: ModuleType, problem: Problem, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        values = backend.forward(problem)
        order = _order(problem)
        ctx.backend, ctx.count = backend, len(tensors)
        ctx.hollow = problem.with_tensors((None,) * len(TENSORS), None)  # no tensor outlives the graph through ctx
        ctx.save_for_backward(*tensors, problem.labels, *(values[name] for name in order))
        ctx.mark_non_differentiable(*(values[name] for name in order if name in FORWARD_ONLY))
        ctx.set_materialize_grads(False)  # statistics without an upstream gradient cost the backward nothing
        return tuple(values[name] for name in order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        tensors, labels, *found = ctx.saved_tensors[: ctx.count], *ctx.saved_tensors[ctx.count :]
        problem = ctx.hollow.with_tensors(tensors, labels)
        order = _order(problem)
        values = dict(zip(order, found, strict=True))
        grads = {name: g for name, g in zip(order, upstream, strict=True) if name in DIFFERENTIABLE and g is not None}
        out = ctx.backend.backward(problem, values, grads) if grads else {}
        return None, None, *(out.get(name) for name in TENSORS)


class _VocabLoss(torch.autograd.Function):
    """Mode eager: the gradients are ready when the forward ends; the backward scales them by one number."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: ModuleType,
        problem: Problem,
        objective: Any,
        per_token: list[Tensor],
        uses: Any,
        weight: Any,
        unit: Any,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        values, grads = _eager(backend)(problem, objective, uses)
        ctx.save_for_backward(*(grads.get(name) for name in TENSORS))
        ctx.empty, ctx.unit = not len(problem.labels), unit
        order = _order(problem)
        ctx.mark_non_differentiable(*(values[name] for name in order))
        losses = torch.cat(per_token) if per_token else values["lse"]
        return (losses * weight).sum(), *(values[name] for name in order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
        grads, upstream = ctx.saved_tensors, upstream * ctx.unit
        if ctx.empty:  # zeros, also where the caller divided by the number of tokens and upstream is infinite
            pass
        elif upstream.device.type != "cpu" or upstream != 1:
            # the graph dies after this backward unless asked to stay: its buffers can be scaled in place
            stays = torch._C._autograd._get_current_graph_task_keep_graph()
            grads = [None if g is None else (g * upstream if stays else g.mul_(upstream)) for g in grads]
        elif torch._C._autograd._get_current_graph_task_keep_graph():
            grads = [None if g is None else g.clone() for g in grads]  # a taken buffer would be added to next time
        return None, None, None, None, None, None, None, *grads


def _eager(backend: ModuleType) -> Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]:
    return getattr(backend, "eager", None) or _two_visits(backend)


def _two_visits(backend: ModuleType) -> Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Eager for a backend that streams: all statistics, then all gradients."""

    def eager(problem: Problem, objective: Any, uses: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        values = backend.forward(problem)
        return values, backend.backward(problem, values, objective(slice(0, len(problem.labels)), values))

    return eager

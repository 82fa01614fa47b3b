"""From a request to a backend: checks the operands, states the problem and streams the vocabulary.

`stream_stats` and `stream_loss` do the work of the public `vocab_stats` and `vocab_loss`, with one `Request` for their
keywords; losses, lazy logits and patches pass a `Request` on to them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Real
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from . import chunked, compiled, reference
from .alike import split_alike, whole_of
from .autograd import eager, recompute
from .class_weights import check_class_weight
from .head import Head, Payload
from .higher import under_function_transform
from .problem import TENSORS, Problem
from .request import Request
from .rows import Rows, autocast_for, autocast_head, check_head
from .statistics import STATISTICS, Stats, wide, with_needed


class TokenLoss(Protocol):
    """What `vocab_loss` requires of a loss: the names of the statistics it differentiates, and a function of them."""

    uses: tuple[str, ...]
    # `linear`, if there is such an attribute: whether `of` is linear in these statistics; such a loss has
    # `slopes(labels)`: its derivatives by each of them, numbers or [N]
    # `class_weight`, if there is such an attribute: None, or [V] factors of the logits in the statistic `mean`

    def of(self, stats: Stats) -> Tensor:
        """Per-token loss [N], nats."""
        ...


def stream_stats(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    outputs: tuple[str, ...],
    request: Request,
    payload: Payload | None = None,
) -> Stats:
    """`vocab_stats` with a request for its keywords; `outputs` names the statistics, `request.observe` is not read."""
    if torch.compiler.is_compiling():
        return compiled.stats(hidden, head, labels, outputs, request, payload)
    head, payload = split_alike(head, payload)
    rows = Rows(hidden, head, labels, request.ignore_index)
    backend = request.backend()
    problem = problem_of(rows, outputs, payload, request, backend)
    values = recompute(backend, problem)
    return rows.scatter(values)


def stream_loss(
    loss: TokenLoss,
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    request: Request,
    token_weight: Tensor | float = 1.0,
    payload: Payload | None = None,
) -> tuple[Tensor, Stats]:
    """`vocab_loss` with a request for its keywords."""
    if torch.compiler.is_compiling():
        return compiled.loss_sum(loss, hidden, head, labels, request, token_weight, payload)
    check_tail(request.tail, loss, head)
    head, payload = split_alike(head, payload)
    rows = Rows(hidden, head, labels, request.ignore_index)
    backend = request.backend()
    problem = replace(
        problem_of(rows, (*loss.uses, *request.observe), payload, request, backend),
        tail=request.tail,
        mean_weight=_mean_weight(loss, rows),
    )
    weight = rows.select(token_weight) if isinstance(token_weight, Tensor) and token_weight.ndim else token_weight
    if problem.needs and not request.unreduced and not under_function_transform(*problem.tensors):
        objective = (LinearSum if getattr(loss, "linear", False) else _WeightedSum)(loss, problem, weight)
        total, values = eager(backend, problem, objective, _origins(problem, head, payload))
        values["loss"] = objective.per_token()
    else:
        values = recompute(backend, problem)
        values["loss"] = loss.of(Stats(values, problem.labels, torch.ones_like(problem.labels, dtype=torch.bool)))
        weighted = values["loss"] * weight
        total = rows.scatter({"loss": weighted}).loss if request.unreduced else weighted.sum()
    return total, rows.scatter({name: value.detach() for name, value in values.items()})


def _mean_weight(loss: Any, rows: Rows) -> Tensor | None:
    """The factors of the logits in the statistic `mean` [V], a copy, since the backward reads it; None without one."""
    weight: Tensor | None = getattr(loss, "class_weight", None)
    if weight is None:
        return None
    check_class_weight(weight, rows.head.vocabulary)
    return weight.detach().to(rows.hidden.device, wide(rows.hidden.dtype), copy=True) if "mean" in loss.uses else None


class _WeightedSum:
    """The objective `sum(weight * loss.of(stats))`, an `autograd.EagerSum`."""

    def __init__(self, loss: TokenLoss, problem: Problem, weight: Tensor | float):
        self.loss, self.uses, self.labels = loss, loss.uses, problem.labels
        self.weight = weight if isinstance(weight, Tensor) and weight.ndim else [weight]
        self.unit = unit_of(weight, problem.hidden.dtype)
        self.parts: list[Tensor] = []
        self.sums = [torch.zeros((), dtype=wide(problem.hidden.dtype), device=problem.hidden.device)]

    def gradients(self, rows: slice, values: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: values[name].detach().requires_grad_() for name in self.uses}
        with torch.enable_grad():
            losses, weight = self._losses(rows, {**values, **leaves})
            total = (losses * weight / self.unit).sum()
        self.parts.append(losses.detach())
        self.sums.append(total.detach() * self.unit)
        if not total.requires_grad:  # a constant loss
            return {"lse": torch.zeros_like(values["lse"])}
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}

    def value(self, rows: slice, values: dict[str, Tensor]) -> Tensor:
        attached = {name: value if name in self.uses else value.detach() for name, value in values.items()}
        losses, weight = self._losses(rows, attached)
        return (losses * weight).sum()

    def _losses(self, rows: slice, values: dict[str, Tensor]) -> tuple[Tensor, Tensor | float]:
        """The losses of these rows and their weights."""
        labels = self.labels[rows]
        weight = self.weight[rows] if isinstance(self.weight, Tensor) else self.weight[0]
        return self.loss.of(Stats(values, labels, torch.ones_like(labels, dtype=torch.bool))), weight

    def total(self) -> Tensor:
        return torch.stack(self.sums).sum()

    def per_token(self) -> Tensor:
        return torch.cat(self.parts) if self.parts else self.sums[0].new_empty(0)


class LinearSum(_WeightedSum):
    """The same for a loss that is linear in its statistics: its gradients are known before the first chunk.

    A chunk costs no operation here, where a graph of [n] tensors takes twenty launches on an accelerator.
    """

    def __init__(self, loss: TokenLoss, problem: Problem, weight: Tensor | float):
        super().__init__(loss, problem, weight)
        self.seen: list[dict[str, Tensor]] = []
        dtype = wide(problem.hidden.dtype)
        with torch.no_grad():
            tokens = problem.hidden.new_full((len(problem.labels),), 1.0, dtype=dtype) * (weight / self.unit)
            slopes = cast(Any, loss).slopes(problem.labels)
            self.slopes = {name: (tokens * slope).to(dtype) for name, slope in slopes.items()}

    def gradients(self, rows: slice, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `autograd.EagerSum`."""
        self.seen.append({name: values[name] for name in self.uses})
        return {name: slope[rows] for name, slope in self.slopes.items()}

    def total(self) -> Tensor:
        """As `autograd.EagerSum`."""
        if not self.seen:
            return super().total()
        values = {name: torch.cat([part[name] for part in self.seen]) for name in self.uses}
        losses, weight = self._losses(slice(None), values)
        self.parts = [losses]
        return (losses * weight).sum()


def unit_of(weight: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """The largest token weight, rounded down to a power of two: float16 gradients are divided by it at first.

    Weights of 1 / (number of tokens) would push them below the range of float16, and a GradScaler's factor, which comes
    later, could not bring them back. Multiplying by a power of two rounds nothing.
    """
    if dtype != torch.float16:
        return 1.0
    if not isinstance(weight, Tensor):
        return 2.0 ** (math.frexp(weight)[1] - 1) if weight else 1.0
    largest = (
        weight.detach().abs().amax().to(torch.float32) if weight.numel() else weight.new_ones((), dtype=torch.float32)
    )
    return torch.where(largest == 0, 1.0, torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1))


def check_tail(tail: Any, loss: TokenLoss, head: Head | None = None) -> None:
    """Raise a ValueError that names the remedy if the sparse tail does not apply to this loss or head."""
    error = float(tail) if not isinstance(tail, bool) and isinstance(tail, Real) else math.nan
    if not 0 <= error < 1:
        raise ValueError(f"tail is {tail!r}: pass a relative error in [0, 1), such as 1e-3; 0 is exact")
    if tail and not set(loss.uses) <= {"lse", "target"}:
        statistic = sorted(set(loss.uses) - {"lse", "target"})[0]
        raise ValueError(
            f"tail is {tail} but the loss {type(loss).__name__} differentiates {statistic!r}, and only losses of log p"
            " have a sparse gradient: pass tail=0"
        )
    if tail and head is not None and head.softcap is not None:
        raise ValueError(f"tail is {tail} but the head has softcap {head.softcap}: pass tail=0")


def problem_of(
    rows: Rows, outputs: tuple[str, ...], payload: Payload | None, request: Request, backend: ModuleType
) -> Problem:
    """The problem that a backend gets: the operands of these rows, and what it has to compute."""
    unknown = sorted(set(outputs) - set(STATISTICS))
    if unknown:
        raise ValueError(f"outputs has {unknown[0]!r}: choose among {', '.join(STATISTICS)}")
    if ("payload" in outputs) != (payload is not None):
        raise ValueError(
            "outputs with 'payload' and the argument payload=(hidden, head) belong together: pass both or neither"
        )
    by_panels = rows.head.fp32 or not isinstance(rows.head.weight, Tensor)
    if by_panels and backend not in (chunked, reference):
        kind = "has fp32=True" if rows.head.fp32 else f"is a {type(rows.head.weight).__name__}"
        raise ValueError(f"impl is 'triton' but the head {kind}, which it cannot multiply: pass impl='chunked'")
    head = rows.head if backend is chunked else rows.head.joined()  # the others take a single matrix
    if payload is not None:
        payload = payload_of(rows, payload)
    if backend is reference:  # which is dense anyway
        head, payload = whole_of(head), None if payload is None else (payload[0], whole_of(payload[1]))
    itemsize = rows.hidden.element_size() * (1 if payload is None else 2)
    problem = Problem(
        hidden=rows.hidden.contiguous(),
        head=head,
        labels=rows.flat,
        outputs=with_needed(outputs),
        payload=payload,
        memory_budget=request.budget(head, len(rows.flat), itemsize),
    )
    grad_enabled = torch.is_grad_enabled()
    tensors = zip(TENSORS, problem.tensors, strict=True)
    needs = {name for name, t in tensors if grad_enabled and t is not None and t.requires_grad}
    return replace(problem, needs=frozenset(needs))


def payload_of(rows: Rows, payload: Payload) -> Payload:
    """The valid rows of the payload's hidden states and its head, checked against the first head."""
    hidden, head = payload
    check_head(hidden, head)
    if hidden.device != rows.hidden.device:
        raise ValueError(f"payload is on {hidden.device} but hidden on {rows.hidden.device}: move one of them")
    if head.size != rows.head.size:
        raise ValueError(
            f"payload's head has {head.size} tokens but the head {rows.head.size}: both need the same vocabulary"
        )
    return autocast_for(head, rows.select(hidden, trailing=1)).contiguous(), autocast_head(head, hidden).joined()


def _origins(problem: Problem, head: Head, payload: Payload | None) -> tuple[Tensor | None, ...]:
    """The tensors that autocast cast the problem's tensors from; of the heads, these are the caller's."""
    whole = head.gain is None or problem.head.gain is not None  # else the problem's weight is a product with it
    originals: tuple[Tensor | None, ...] = (None, *(x if whole else None for x in head.tensors.values()), None)
    second: dict[str, Any] = {} if payload is None or payload[1].gain is not None else payload[1].tensors
    originals += (second.get("weight"), second.get("bias"))
    pairs = zip(originals, problem.tensors, strict=True)
    return tuple(x if x is not None and y is not None and x.shape == y.shape else y for x, y in pairs)

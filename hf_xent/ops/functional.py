"""The public door of floor 0: `vocab_stats` (any graph on top), `vocab_loss` (sums), `map_logits` (full rows)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import chunked, reference
from .autograd import eager, recompute
from .head import Head, Payload
from .higher import composed
from .problem import TENSORS, Problem
from .rows import Rows, autocast, autocast_head, check_head, check_ids, ignored_id, token_ids
from .statistics import STATISTICS, Stats, wide

IMPLS = ("reference", "chunked", "triton")


class TokenLoss(Protocol):
    """What `vocab_loss` asks of a loss: statistics it differentiates, and the per-token loss from them."""

    uses: tuple[str, ...]

    def of(self, stats: Stats) -> Tensor:
        """Per-token loss [N], nats."""
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
    A backward with `create_graph=True` costs more, so that its gradients can be differentiated again, any number of
    times: they come from dense rows, a chunk at a time. torch.func and forward mode get all logits at once.
    `payload=(hidden2, head2)` adds the expectation of a second head's logits under the first head's softmax.
    `memory_budget` bounds the bytes of logits alive at a time (default: half a byte a number in the head, at
    least 24 MiB).
    `impl` is 'reference', 'chunked' or 'triton' (default: the environment's HF_XENT_IMPL, else 'chunked').

    Returns: Stats shaped like labels; ignored positions hold 0.
    Raises: ValueError for shapes that do not fit, labels outside the vocabulary, unknown statistics.
    Source: the softmax is streamed as in Wijmans et al. 2024, Cut Your Losses, arXiv:2411.09009; the statistics and
    their common backward are this project's.
    """
    rows = Rows(hidden, head, labels, ignore_index)
    backend = _backend(impl)
    problem = _problem(rows, outputs, payload, memory_budget, backend)
    values = recompute(backend, problem)
    return rows.scatter(values)


def dense_stats(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    outputs: tuple[str, ...] = ("lse", "target", "entropy", "top"),
    ignore_index: int = -100,
) -> Stats:
    """The statistics of logits that exist already, as `vocab_stats` gives them, by plain torch operations.

    Raises: ValueError for shapes that do not fit, labels outside the vocabulary, unknown statistics.
    """
    labels, ignored = token_ids(labels), ignored_id(ignore_index)
    if logits.ndim == 0 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} but logits {tuple(logits.shape)}: pass one label per row of logits"
        )
    if unknown := [name for name in outputs if name not in STATISTICS or name == "payload"]:
        choices = ", ".join(name for name in STATISTICS if name != "payload")
        raise ValueError(f"outputs has {unknown[0]!r}: choose among {choices}")
    if labels.device != logits.device:
        raise ValueError(f"labels is on {labels.device} but logits on {logits.device}: move one of them")
    mask = labels != ignored
    z, ids = logits[mask], labels[mask]
    check_ids(ids, z.shape[-1], ignored)
    found = reference.statistics(z.to(wide(z.dtype)), ids)
    values = {name: found[name].new_zeros(mask.shape).masked_scatter(mask, found[name]) for name in outputs}
    return Stats(values, labels, mask)


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
    tail: float = 0.0,
) -> tuple[Tensor, Stats]:
    """The sum `token_weight * loss.of(stats)` over all valid tokens, and detached statistics.

    Mode *eager*: gradients are taken while a chunk of logits is alive, three matmuls in all. `loss.of` sees the
    statistics in `loss.uses`, `observe` adds others to the returned Stats, which also holds each token's unweighted
    `loss`. With `unreduced` the weighted losses come in the shape of labels, 0 at ignored positions (mode *recompute*:
    their upstream gradients are not known yet). Other parameters, errors and source: `vocab_stats`.

    `tail` above 0 compresses the gradient of unlikely tokens (`hf_xent.ops.tail`): the relative error it may make in
    the gradient of the logits, 1e-3 for instance; the loss itself stays exact. 1 + 3k matmuls, k the share of the
    vocabulary that matters. For losses of log p alone and heads without softcap: refused elsewhere with a ValueError.
    Exact with `unreduced`, with impl='reference', and in a backward with `create_graph=True`.
    """
    check_tail(tail, loss, head)
    rows = Rows(hidden, head, labels, ignore_index)
    backend = _backend(impl)
    problem = replace(_problem(rows, (*loss.uses, *observe), payload, memory_budget, backend), tail=tail)
    weight = rows.select(token_weight) if isinstance(token_weight, Tensor) and token_weight.ndim else token_weight
    if problem.needs and not unreduced and not composed(*problem.tensors):
        objective = _WeightedSum(loss, problem, weight)
        total, values = eager(backend, problem, objective, _origins(problem, head, payload))
        values["loss"] = objective.per_token()
    else:
        values = recompute(backend, problem)
        values["loss"] = loss.of(Stats(values, problem.labels, torch.ones_like(problem.labels, dtype=torch.bool)))
        weighted = values["loss"] * weight
        total = rows.scatter({"loss": weighted}).loss if unreduced else weighted.sum()
    return total, rows.scatter({name: value.detach() for name, value in values.items()})


class _WeightedSum:
    """The objective `sum(weight * loss.of(stats))`, an `autograd.EagerSum`."""

    def __init__(self, loss: TokenLoss, problem: Problem, weight: Tensor | float):
        self.loss, self.uses, self.labels = loss, loss.uses, problem.labels
        self.weight = weight if isinstance(weight, Tensor) and weight.ndim else [weight]
        self.unit = _unit(weight, problem.hidden.dtype)
        self.parts: list[Tensor] = []
        self.sums = [torch.zeros((), dtype=wide(problem.hidden.dtype), device=problem.hidden.device)]

    def gradients(self, rows: slice, values: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: values[name].detach().requires_grad_() for name in self.uses}
        with torch.enable_grad():
            found, weight = self._of(rows, {**values, **leaves})
            total = (found * weight / self.unit).sum()
        self.parts.append(found.detach())
        self.sums.append(total.detach() * self.unit)
        if not total.requires_grad:  # a constant loss
            return {"lse": torch.zeros_like(values["lse"])}
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}

    def value(self, rows: slice, values: dict[str, Tensor]) -> Tensor:
        kept = {name: value if name in self.uses else value.detach() for name, value in values.items()}
        found, weight = self._of(rows, kept)
        return (found * weight).sum()

    def _of(self, rows: slice, values: dict[str, Tensor]) -> tuple[Tensor, Tensor | float]:
        """The losses of these rows and their weights."""
        labels = self.labels[rows]
        weight = self.weight[rows] if isinstance(self.weight, Tensor) else self.weight[0]
        return self.loss.of(Stats(values, labels, torch.ones_like(labels, dtype=torch.bool))), weight

    def total(self) -> Tensor:
        return torch.stack(self.sums).sum()

    def per_token(self) -> Tensor:
        return torch.cat(self.parts) if self.parts else self.sums[0].new_empty(0)


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
    check_head(hidden, head)
    hidden, head = autocast(hidden), autocast_head(head, hidden)

    def run(function: Callable[..., Tensor], *part: Tensor) -> Tensor:
        # torch.func knows no saved-tensor hooks, which checkpoints are made of: there the rows stay
        return function(*part) if composed() else checkpoint(function, *part, use_reentrant=False)

    row = head.size * wide(hidden.dtype).itemsize * 4  # fn needs room of its own
    step = max(1, _budget(memory_budget, head) // row)
    parts = []
    for i in range(0, max(1, len(hidden)), step):
        part = [x[i : i + step] for x in (hidden, *rows)]
        parts.append(run(lambda h, *r: fn(head.logits(h), *r), *part))
    return torch.cat(parts)


def default_budget(head: Head) -> int:
    """Bytes of logits alive at a time: half a byte a number in the head, so that they do not stand out beside it.

    That is an eighth of a float32 head and makes D / 8 rows a chunk; a 16-bit one gets twice the rows, as its matmuls
    want. At least 24 MiB on a CPU (128 float32 rows of a 49k vocabulary: below that matmuls slow down), 256 MiB
    elsewhere (not yet measured there).
    """
    rows = head.size if head.shard is None else head.shard.width  # the same on all ranks
    return max((24 if head.weight.device.type == "cpu" else 256) << 20, rows * head.weight.shape[1] // 2)


def _budget(memory_budget: Any, head: Head) -> int:
    """The bytes given, or the default. Raises: ValueError for what is no positive number."""
    if memory_budget is None:
        return default_budget(head)
    given = float(memory_budget) if isinstance(memory_budget, Real) else math.nan
    if not 0 < given < math.inf:
        raise ValueError(f"memory_budget is {memory_budget!r}: pass a positive number of bytes")
    return max(1, int(given))


def check_tail(tail: Any, loss: TokenLoss, head: Head | None = None) -> None:
    """Refuse a sparse tail where it does not hold, with a ValueError that names the remedy."""
    given = float(tail) if not isinstance(tail, bool) and isinstance(tail, Real) else math.nan
    if not 0 <= given < 1:
        raise ValueError(f"tail is {tail!r}: pass a relative error in [0, 1), such as 1e-3; 0 is exact")
    if tail and not set(loss.uses) <= {"lse", "target"}:
        other = sorted(set(loss.uses) - {"lse", "target"})[0]
        raise ValueError(
            f"tail is {tail} but the loss {type(loss).__name__} differentiates {other!r}, and only losses of log p have"
            " a sparse gradient: pass tail=0"
        )
    if tail and head is not None and head.softcap is not None:
        raise ValueError(f"tail is {tail} but the head has softcap {head.softcap}: pass tail=0")
    if tail and head is not None and head.shard is not None:
        raise ValueError(f"tail is {tail} but the head is split over {head.shard.group.size()} ranks: pass tail=0")


def _backend(impl: str | None) -> ModuleType:
    name = impl or os.environ.get("HF_XENT_IMPL") or "chunked"
    if name not in IMPLS:
        raise ValueError(f"impl is {name!r}: choose one of {', '.join(IMPLS)} (argument impl, or HF_XENT_IMPL)")
    if name == "triton":
        from .gpu import streaming  # imported here: triton is optional

        return streaming
    return {"reference": reference, "chunked": chunked}[name]


def _problem(
    rows: Rows, outputs: tuple[str, ...], payload: Payload | None, memory_budget: int | None, backend: ModuleType
) -> Problem:
    unknown = sorted(set(outputs) - set(STATISTICS))
    if unknown:
        raise ValueError(f"outputs has {unknown[0]!r}: choose among {', '.join(STATISTICS)}")
    if ("payload" in outputs) != (payload is not None):
        raise ValueError(
            "outputs names 'payload' and payload=(hidden, head) is given only together: pass both or neither"
        )
    head = rows.head if backend is chunked else rows.head.joined()  # the others multiply one matrix
    if head.shard is not None and (backend is reference or "rank" in outputs):
        what = "impl is 'reference'" if backend is reference else "outputs has 'rank'"
        raise ValueError(f"{what} but the head is split over {head.shard.group.size()} ranks: gather its weight first")
    ask = {"lse", "target", *outputs} | ({"entropy"} if "variance" in outputs else set())
    if payload is not None:
        payload = _payload(rows, payload)
    problem = Problem(
        hidden=rows.hidden.contiguous(),
        head=head,
        labels=rows.flat,
        outputs=frozenset(ask),
        payload=payload,
        memory_budget=_budget(memory_budget, head),
    )
    wanted = torch.is_grad_enabled()
    needs = {
        name for name, t in zip(TENSORS, problem.tensors, strict=True) if wanted and t is not None and t.requires_grad
    }
    return replace(problem, needs=frozenset(needs))


def _origins(problem: Problem, head: Head, payload: Payload | None) -> tuple[Tensor | None, ...]:
    """What each of the problem's tensors was cast from by autocast: of the heads, the caller's own."""
    own: tuple[Tensor | None, ...] = (None, head.weight, head.bias, head.adapter, None)
    own += (None, None) if payload is None else (payload[1].weight, payload[1].bias)
    pairs = zip(own, problem.tensors, strict=True)
    return tuple(x if x is not None and y is not None and x.shape == y.shape else y for x, y in pairs)


def _payload(rows: Rows, payload: Payload) -> Payload:
    hidden, head = payload
    check_head(hidden, head)
    if hidden.device != rows.hidden.device:
        raise ValueError(f"payload is on {hidden.device} but hidden on {rows.hidden.device}: move one of them")
    if (head.shard is None) != (rows.head.shard is None):
        raise ValueError("one of payload's head and the head is split over ranks: split both, or none")
    if head.size != rows.head.size:
        raise ValueError(
            f"payload's head has {head.size} tokens but the head {rows.head.size}: both need the same vocabulary"
        )
    return autocast(rows.select(hidden, trailing=1)).contiguous(), autocast_head(head, hidden).joined()


def _unit(weight: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    """The largest token weight: what float16 gradients of mode eager are held in until a GradScaler's factor comes.

    Weights of 1 / (number of tokens) would push them below float16's range before they could be scaled up.
    """
    if dtype != torch.float16:
        return 1.0
    if not isinstance(weight, Tensor):
        return abs(weight) or 1.0
    largest = weight.detach().abs().amax() if weight.numel() else weight.new_ones(())
    return torch.where(largest == 0, 1.0, largest)

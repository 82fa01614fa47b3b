"""What the operators of `compiled` do when a compiled program runs: the same backends as without the compiler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import compiled
from .autograd import visit_once
from .dispatch import LinearSum, check_tail, problem_of, stream_stats
from .higher import ROWS
from .rows import Rows
from .statistics import Stats


@dataclass(frozen=True)
class Linear:
    """A loss that has these derivatives by statistics, as a `dispatch.TokenLoss`."""

    slopes: dict[str, float]

    @property
    def uses(self) -> tuple[str, ...]:
        """The statistics that it differentiates."""
        return tuple(name for name, slope in self.slopes.items() if slope)

    def of(self, stats: Stats) -> Tensor:
        """Per-token loss [N]."""
        return torch.stack([self.slopes[name] * stats.values[name] for name in self.uses]).sum(0)


def stats(*arguments: Any) -> list[Tensor]:
    """The operator `hf_xent::stats`."""
    hidden, head, labels, payload, request, outputs = compiled.unpack(arguments)
    with torch.no_grad():
        values = stream_stats(hidden, head, labels, tuple(outputs), request, payload).values
    return [values[name].contiguous() for name in outputs]


def stats_backward(*arguments: Any) -> list[Tensor]:
    """The operator `hf_xent::stats_backward`."""
    hidden, head, labels, payload, request, outputs = compiled.unpack(arguments)
    values, upstream, needs = arguments[16:]
    rows, backend = Rows(hidden, head, labels, request.ignore_index), request.backend()
    problem = replace(problem_of(rows, tuple(outputs), payload, request, backend), needs=frozenset(needs))
    saved = {name: rows.select(x) for name, x in zip(outputs, values, strict=True)}
    grads = {name: rows.select(g) for name, g in zip(outputs, upstream, strict=True) if g is not None}
    found = backend.backward(problem, saved, grads)
    return [rows.restored(found[name]) if name in ROWS else found[name].contiguous() for name in needs]


def linear_loss(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The operator `hf_xent::linear_loss`."""
    hidden, head, labels, _, request, outputs = compiled.unpack(arguments)
    token_weight, slopes, tail, needs = arguments[16:]
    loss: Any = Linear(dict(zip(compiled.SLOPED, slopes, strict=True)))
    check_tail(tail, loss, head)
    rows, backend = Rows(hidden, head, labels, request.ignore_index), request.backend()
    problem = problem_of(rows, tuple(outputs), None, request, backend)
    problem = replace(problem, tail=tail, needs=frozenset(needs))
    objective = LinearSum(loss, problem, rows.select(token_weight), {name: loss.slopes[name] for name in loss.uses})
    values, grads = visit_once(backend, problem, objective)
    unit = torch.as_tensor(objective.unit, dtype=token_weight.dtype, device=token_weight.device).clone()
    in_shape = rows.scatter(values).values
    grads = {name: rows.restored(g) if name in ROWS else g.contiguous() for name, g in grads.items()}
    return objective.total(), unit, [in_shape[name] for name in outputs], [grads[name] for name in needs]


for _operator in (stats, stats_backward, linear_loss):
    compiled.LIBRARY.impl(_operator.__name__, _operator, "CompositeExplicitAutograd")

"""What the operators of `compiled` do when a compiled program runs: the same backends as without the compiler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import compiled
from .autograd import recompute, visit_once
from .class_weights import check_class_weight
from .compiled import COUNT, Operands
from .dispatch import LinearSum, check_tail, problem_of
from .higher import ROWS
from .problem import Problem
from .rows import Rows
from .statistics import Stats


@dataclass(frozen=True)
class Linear:
    """A loss with these derivatives by statistics, [N] each, as a `dispatch.TokenLoss`."""

    by_name: dict[str, Tensor]
    uses: tuple[str, ...]

    def slopes(self, labels: Tensor) -> dict[str, Tensor]:
        """The derivatives by each statistic."""
        return self.by_name

    def of(self, stats: Stats) -> Tensor:
        """Per-token loss [N]."""
        return torch.stack([self.by_name[name] * stats.values[name] for name in self.uses]).sum(0)


def stats(*arguments: Any) -> list[Tensor]:
    """The operator `hf_xent::stats`."""
    with torch.no_grad():
        _, rows, backend, problem = _problem(arguments)
        values = rows.scatter(recompute(backend, problem)).values
    return [values[name].contiguous() for name in arguments[COUNT - 1]]


def stats_backward(*arguments: Any) -> list[Tensor]:
    """The operator `hf_xent::stats_backward`."""
    values, upstream, needs = arguments[COUNT:]
    operands, rows, backend, problem = _problem(arguments)
    problem = replace(problem, needs=frozenset(needs))
    saved = {name: rows.select(x) for name, x in zip(operands.outputs, values, strict=True)}
    grads = {name: rows.select(g) for name, g in zip(operands.outputs, upstream, strict=True) if g is not None}
    return _in_shape(rows, backend.backward(problem, saved, grads), needs)


def linear_loss(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """The operator `hf_xent::linear_loss`."""
    token_weight, slopes, tail, needs = arguments[COUNT:]
    operands, rows, backend, problem = _problem(arguments)
    uses = ("lse", "target", "mean")[: len(slopes)]
    loss: Any = Linear({name: rows.select(x) for name, x in zip(uses, slopes, strict=True)}, uses)
    check_tail(tail, loss, operands.head)
    problem = replace(problem, tail=tail, needs=frozenset(needs))
    objective = LinearSum(loss, problem, rows.select(token_weight))
    values, grads = visit_once(backend, problem, objective)
    in_shape = rows.scatter(values).values
    unit = torch.as_tensor(objective.unit, dtype=token_weight.dtype, device=token_weight.device).clone()
    return objective.total(), unit, [in_shape[name] for name in operands.outputs], _in_shape(rows, grads, needs)


def _problem(arguments: tuple[Any, ...]) -> tuple[Operands, Rows, ModuleType, Problem]:
    """The operands of an operator, their valid rows, the backend and the problem for it."""
    operands = Operands.of(arguments)
    rows = Rows(operands.hidden, operands.head, operands.labels, operands.request.ignore_index)
    if operands.mean_weight is not None:
        check_class_weight(operands.mean_weight, operands.head.size)
    backend = operands.request.backend()
    problem = problem_of(rows, tuple(operands.outputs), operands.payload, operands.request, backend)
    return operands, rows, backend, replace(problem, mean_weight=operands.mean_weight)


def _in_shape(rows: Rows, grads: dict[str, Tensor], needs: list[str]) -> list[Tensor]:
    """Gradients in the shapes of the operands, each in memory of its own."""
    return [rows.restored(grads[name]) if name in ROWS else grads[name].contiguous() for name in needs]


for _operator in (stats, stats_backward, linear_loss):
    compiled.LIBRARY.impl(_operator.__name__, _operator, "CompositeExplicitAutograd")

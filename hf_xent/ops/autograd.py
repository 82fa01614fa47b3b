"""How a backend joins the autograd graph: mode *recompute* for any upstream gradients, mode *eager* for a sum.

Both visit the logits once in the forward; recompute visits them again in the backward. A backward that is to be
differentiated again (`create_graph=True`) goes through `higher`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from . import higher, reference, tail
from .gpu.launch import can_launch
from .problem import TENSORS, Problem, Upstream
from .ranks import merge_ranks, reduce_from_ranks
from .statistics import DIFFERENTIABLE, FORWARD_ONLY, STATISTICS


def recompute(backend: ModuleType, problem: Problem) -> dict[str, Tensor]:
    """Every requested statistic; any differentiable computation may follow."""
    with torch.autocast(problem.hidden.device.type, enabled=False):
        if higher.under_function_transform(*problem.tensors):
            return reference.forward(problem)
        if not problem.needs:
            with torch.no_grad():
                values = merge_ranks(problem, backend.forward(problem))
            return {name: values[name] for name in _output_names(problem)}
        values = _Recompute.apply(backend, problem, *problem.tensors)
    return dict(zip(_output_names(problem), values, strict=True))


class EagerSum(Protocol):
    """The function that mode eager differentiates: a sum over tokens, visited chunk by chunk."""

    uses: tuple[str, ...]  # statistics it can have gradients for
    unit: Tensor | float  # what its gradients are divided by

    def gradients(self, rows: slice, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sum's gradients by these rows' statistics, divided by `unit`: an `Upstream`."""
        ...

    def total(self) -> Tensor:
        """The sum over all chunks visited."""
        ...

    def value(self, rows: slice, values: dict[str, Tensor]) -> Tensor:
        """The sum over these rows, with a graph; the state of this object does not change."""
        ...


def eager(
    backend: ModuleType, problem: Problem, objective: EagerSum, origins: tuple[Tensor | None, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """A sum and detached statistics; the sum's gradients are ready when this returns.

    `origins` are the tensors that the problem's were cast from, or those themselves: the graph keeps no cast copies.
    """
    with torch.autocast(problem.hidden.device.type, enabled=False):
        total, *values = _Eager.apply(backend, problem, objective, origins, *problem.tensors)
    return total, dict(zip(_output_names(problem), values, strict=True))


def _output_names(problem: Problem) -> list[str]:
    """The requested statistics in the order in which a Function returns them, the differentiable ones first."""
    return [name for name in STATISTICS if name in problem.outputs]


class _Recompute(torch.autograd.Function):
    """Mode recompute: only the inputs and the statistics are saved for the backward."""

    @staticmethod
    def forward(ctx: Any, backend: ModuleType, problem: Problem, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        values = merge_ranks(problem, backend.forward(problem))
        order = _output_names(problem)
        ctx.backend, ctx.count = backend, len(tensors)
        ctx.problem = problem.without_tensors()
        ctx.save_for_backward(*tensors, problem.labels, *(values[name] for name in order))
        ctx.mark_non_differentiable(*(values[name] for name in order if name in FORWARD_ONLY))
        ctx.set_materialize_grads(False)  # statistics without an upstream gradient cost the backward nothing
        return tuple(values[name] for name in order)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        problem = ctx.problem.with_tensors(saved[: ctx.count], saved[ctx.count])
        order = _output_names(problem)
        values = dict(zip(order, saved[ctx.count + 1 :], strict=True))
        grads = {name: g for name, g in zip(order, upstream, strict=True) if name in DIFFERENTIABLE and g is not None}
        if torch.is_grad_enabled() or higher.under_function_transform(*grads.values()):

            def statistics(rows: slice, recomputed: dict[str, Tensor]) -> list[Tensor]:
                return [recomputed[name] for name in grads]

            return None, None, *higher.gradients(problem, statistics, tuple(grads.values()))
        out = reduce_from_ranks(problem, ctx.backend.backward(problem, values, grads)) if grads else {}
        return None, None, *(out.get(name) for name in TENSORS)


class _Eager(torch.autograd.Function):
    """Mode eager: the gradients are ready when the forward ends; the backward scales them by one number."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: ModuleType,
        problem: Problem,
        objective: EagerSum,
        origins: tuple[Tensor | None, ...],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        values, grads = visit_once(backend, problem, objective)
        ctx.save_for_backward(*(grads.get(name) for name in TENSORS), *origins, problem.labels)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        ctx.problem, ctx.objective = problem.without_tensors(), objective
        statistics = [values[name] for name in _output_names(problem)]
        ctx.mark_non_differentiable(*statistics)
        return objective.total(), *statistics

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
        *saved, labels = ctx.saved_tensors
        grads, origins, objective = saved[: len(TENSORS)], saved[len(TENSORS) :], ctx.objective
        if torch.is_grad_enabled() or higher.under_function_transform(upstream):
            pairs = zip(origins, ctx.dtypes, strict=True)
            tensors = tuple(None if t is None else t.to(dtype) for t, dtype in pairs)
            problem = ctx.problem.with_tensors(tensors, labels)

            def loss_sum(rows: slice, recomputed: dict[str, Tensor]) -> list[Tensor]:
                return [objective.value(rows, recomputed)]

            return None, None, None, None, *higher.gradients(problem, loss_sum, (upstream,))
        return None, None, None, None, *scaled(grads, upstream * objective.unit, empty=not len(labels))


def scaled(grads: list[Tensor | None], upstream: Tensor, *, empty: bool) -> list[Tensor | None]:
    """Ready gradients times one number, in a backward; `empty` if there are no tokens."""
    if empty:  # zeros; upstream is infinite if the caller divided by the number of tokens
        return grads
    # unless the graph is kept for another backward, its buffers can be scaled in place
    keep_graph = torch._C._autograd._get_current_graph_task_keep_graph()
    if upstream.device.type != "cpu" or upstream != 1:
        return [None if g is None else _scaled(g, upstream, in_place=not keep_graph) for g in grads]
    return [None if g is None else g.clone() for g in grads] if keep_graph else grads  # the next would add to these


def _scaled(grad: Tensor, factor: Tensor, *, in_place: bool) -> Tensor:
    """grad * factor, a tensor with one element; with Triton, in place, where that is 1 nothing is read or written."""
    if grad.is_contiguous() and _has_triton(factor):
        from .gpu.scaling import scale_unless_one_  # imported here: triton is optional

        return scale_unless_one_(grad if in_place else grad.clone(), factor)
    return grad.mul_(factor) if in_place else grad * factor


def _has_triton(x: Tensor) -> bool:
    return x.is_cuda and can_launch(x.device)


def visit_once(
    backend: ModuleType, problem: Problem, objective: EagerSum
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Statistics, and the objective's gradients divided by its unit, without a graph."""
    if problem.tail and len(problem.labels) and hasattr(backend, "survey"):
        values, grads = tail.eager(backend, problem, objective.gradients)
    else:
        visit = getattr(backend, "eager", None) or _two_visits(backend)
        values, grads = visit(problem, objective.gradients, objective.uses)
    return values, reduce_from_ranks(problem, grads)


def _two_visits(backend: ModuleType) -> Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Mode eager for a backend that stores no logits: first all statistics, then all gradients."""

    def visit(problem: Problem, upstream: Upstream, uses: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        values = merge_ranks(problem, backend.forward(problem))
        return values, backend.backward(problem, values, upstream(slice(0, len(problem.labels)), values))

    return visit

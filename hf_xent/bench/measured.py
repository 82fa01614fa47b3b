"""What was measured of one contestant, the gate that its gradients pass, and the row it becomes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .config import BenchConfig
from .contestants import BASE, FLOOR, Contestant
from .inputs import Facts
from .rows import OK, Row

Errors = dict[str, float]  # relative to the truth: loss, hidden (its gradient), weight (its gradient)
REFERENCES = (BASE, FLOOR)  # the times of the others are compared with theirs
GRADIENTS = ("hidden", "weight")
ATOL = 1e-5


@dataclass(kw_only=True)
class Measured:
    """The measurements of one contestant so far; times are in seconds, memory in bytes."""

    status: str = OK
    note: str = ""
    errors: Errors | None = None
    memory: int | None = None
    times: list[float] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in REFERENCES})


def tolerance(dtype: torch.dtype, dense: Mapping[str, float] | None) -> Errors:
    """The largest gradient errors of a contestant without a tolerance of its own: twice those of dense, if it ran."""
    if dense is None:
        minimum = ATOL if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        return dict.fromkeys(GRADIENTS, minimum)
    return {name: max(2 * dense[name], ATOL) for name in GRADIENTS}


def allowed(contestant: Contestant, bounds: Errors) -> Errors:
    """The largest allowed errors of its gradients: its tolerance or that of the run, whichever is larger."""
    return {name: max(bound, contestant.tolerance) for name, bound in bounds.items()}


def passes(errors: Errors, bounds: Errors) -> bool:
    """Whether the errors of both gradients are within the bounds; NaN is not."""
    return all(errors[name] <= bound for name, bound in bounds.items())


def to_row(
    name: str,
    contestant: Contestant,
    found: Measured,
    bounds: Errors,
    facts: Facts,
    config: BenchConfig,
    environment: dict[str, Any],
) -> Row:
    """The row of a contestant; `bounds` is the run's `tolerance`."""
    errors = found.errors or {}
    median = statistics.median(found.times) if found.status == OK and found.times else None
    memory = found.memory if found.status == OK else None
    ratios = {key: statistics.median(values) for key, values in found.ratios.items() if values and median is not None}
    largest = allowed(contestant, bounds) if contestant.gated else {}
    return Row(
        contestant=name,
        status=found.status,
        time_ms=None if median is None else 1e3 * median,
        iqr_ms=None if median is None else 1e3 * _iqr(found.times),
        repeats=len(found.times),
        tokens_per_s=None if median is None else facts.N / median,
        time_ratio=ratios.get(BASE),
        matmul_ratio=ratios.get(FLOOR),
        peak_mib=None if memory is None else memory / 2**20,
        peak_ratio=None if memory is None else memory / facts.logits_bytes,
        loss_error=errors.get("loss"),
        hidden_error=errors.get("hidden"),
        weight_error=errors.get("weight"),
        hidden_tolerance=largest.get("hidden"),
        weight_tolerance=largest.get("weight"),
        note=found.note,
        N=facts.N,
        V=facts.V,
        D=facts.D,
        dtype=config.dtype,
        source=facts.source,
        objective=config.objective,
        **environment,
    )


def _iqr(times: list[float]) -> float:
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low

"""Projected gradient ascent on the inputs of a model: the one loop behind every attack and every adversarial training.

    x' <- project(x' + size_i step(d objective / d x'))        i = 0, 1, ..., steps - 1

Each step is one forward and one backward pass of the rows that are left; one more forward pass looks at the last point.
Gradients are those of inputs alone: no gradient of a parameter is computed. Rows for which the objective says that they
are done leave the batch, so that an attack costs less the more of its rows have flipped.

Source: Madry et al. 2018, arXiv:1706.06083.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .ball import Ball

Objective = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(step, x' [R, ...], rows [R]) -> values [R], which are increased, and which rows are done [R], or None."""


class Found(NamedTuple):
    """What an ascent has found."""

    x: Tensor
    """The inputs [B, ...]: where a row was done, its best point, or its last one."""
    done: Tensor
    """Which rows were done [B]."""
    passes: int
    """Forward passes of single rows; all but the last of each row had a backward pass."""


def ascend(
    objective: Objective, x: Tensor, ball: Ball, sizes: Sequence[float], start: Tensor, *, best: bool = False
) -> Found:
    """Increases an objective within a ball.

    Args:
        objective: What is increased; it is called once a step for the rows that are left, and once at the end.
        x: The centers [B, ...].
        ball: The ball around each.
        sizes: The size of each step, in units.
        start: Where the ascent starts [B, ...], such as `ball.start(x)`.
        best: Whether a row that is not done is returned where its objective was largest, not where it ended. The
            objective has to be the same in all steps.

    Returns:
        The inputs, without a gradient.
    """
    found, done = start.detach().clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    rows, center, current = torch.arange(len(x), device=x.device), x.detach(), start.detach()
    highest = torch.full((len(x),), -torch.inf, device=x.device)
    local, passes = ball, 0
    for step in range(len(sizes) + 1):
        last = step == len(sizes)
        passes += len(rows)
        with torch.set_grad_enabled(not last):
            point = current.requires_grad_(not last)
            values, finished = objective(step, point, rows)
        if best:
            with torch.no_grad():
                better = values > highest[rows]
                highest[rows] = values.to(highest.dtype).maximum(highest[rows])
                found[rows[better]] = point.detach()[better]
        if last and not best:
            found[rows] = point
        if finished is not None and bool(finished.any()):
            found[rows[finished]], done[rows[finished]] = point.detach()[finished], True
        if last:
            break
        (gradient,) = torch.autograd.grad(values, point, torch.ones_like(values))  # works under no_grad, too
        current = local.project(point.detach() + local.step(gradient, sizes[step]), center)
        if finished is not None and bool(finished.any()):
            kept = ~finished
            rows, center, current = rows[kept], center[kept], current[kept]
            local = ball.rows(rows)
            if not len(rows):
                break
    return Found(found, done, passes)

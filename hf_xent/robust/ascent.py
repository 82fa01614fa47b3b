"""Projected gradient ascent on the inputs of a model: the one loop behind every attack and every adversarial training.

    x' <- project(x' + size_i step(d objective / d x'))        i = 0, 1, ..., steps - 1

Each step is one forward and one backward pass of the rows that are left; one more forward pass looks at the last point.
Gradients are those of inputs alone: no gradient of a parameter is computed. Rows for which the objective says that they
are done leave the batch, so that an attack costs less the more of its rows have flipped. Where a step leads is said by
a `Walk`, which other attacks replace by one that remembers.

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
    """The inputs [B, ...]: where a row was done, the first such point; else its best point, or its last one."""
    done: Tensor
    """Which rows were done [B]."""
    passes: int
    """Forward passes of single rows; all but the last of each row had a backward pass."""


class At(NamedTuple):
    """Where an ascent is, for the R rows that are left."""

    step: int
    x: Tensor
    """[R, ...]."""
    values: Tensor
    """Of the objective [R]."""
    gradient: Tensor
    """Of the objective [R, ...]."""


class Walk:
    """Where an ascent goes from a point: steps of given sizes. Another walk may remember what it needs of each row.

    Args:
        sizes: The size of each step, in units of the ball.
    """

    def __init__(self, sizes: Sequence[float]):
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def next(self, at: At, ball: Ball, center: Tensor) -> Tensor:
        """The next point [R, ...] within the ball around the center [R, ...]."""
        return ball.project(at.x + ball.step(at.gradient, self.sizes[at.step]), center)

    def keep(self, kept: Tensor) -> None:
        """Forgets the rows of the last point that have left; `kept` [R] says which have not."""


def ascend(
    objective: Objective,
    x: Tensor,
    ball: Ball,
    sizes: Sequence[float] | Walk,
    start: Tensor,
    *,
    best: bool = False,
    leave: bool = True,
) -> Found:
    """Increases an objective within a ball.

    Args:
        objective: What is increased; it is called once a step for the rows that are left, and once at the end.
        x: The centers [B, ...].
        ball: The ball around each.
        sizes: The size of each step, in units; or a walk.
        start: Where the ascent starts [B, ...], such as `ball.start(x)`.
        best: Whether a row that is not done is returned where its objective was largest, not where it ended. The
            objective has to be the same in all steps.
        leave: Whether rows that are done leave the batch.

    Returns:
        The inputs, without a gradient.

    Raises:
        ValueError: The objective does not depend on the inputs.
    """
    walk = sizes if isinstance(sizes, Walk) else Walk(sizes)
    rows = torch.arange(len(x), device=x.device)
    found, done = start.detach().clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
    highest = torch.full((len(x),), -torch.inf, device=x.device)
    center, current, local, passes = x.detach(), start.detach(), ball, 0
    for step in range(len(walk) + 1):
        last = step == len(walk)
        passes += len(rows)
        with torch.set_grad_enabled(not last):
            point = current.requires_grad_(not last)
            values, finished = objective(step, point, rows)
        at, new = point.detach(), None
        if finished is not None and bool(finished.any()):
            new = finished & ~done[rows]
        if best:
            better = (values.detach() > highest[rows]) & ~done[rows]
            highest[rows] = highest[rows].where(~better, values.detach().to(highest.dtype))
            found[rows[better]] = at[better]
        elif last:
            found[rows[~done[rows]]] = at[~done[rows]]
        if new is not None:
            found[rows[new]], done[rows[new]] = at[new], True
        if last or (leave and new is not None and bool(done.all())):
            break
        current = walk.next(At(step, at, values.detach(), _gradient(values, point)), local, center)
        if leave and new is not None:
            kept = ~done[rows]
            rows, current = rows[kept], current[kept]
            walk.keep(kept)
            center, local = x.detach()[rows], ball.rows(rows)
    return Found(found, done, passes)


def _gradient(values: Tensor, point: Tensor) -> Tensor:
    """Of the values with respect to the point."""
    gradient = None
    if values.requires_grad:  # without a sum, which has no gradient where gradients are disabled around the ascent
        (gradient,) = torch.autograd.grad(values, point, torch.ones_like(values), allow_unused=True)
    if gradient is None:
        raise ValueError("the objective does not depend on the inputs: pass a model that reads them, with gradients")
    return gradient

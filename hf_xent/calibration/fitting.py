"""Fitting a calibrator on rows that its classifier was not trained on: one temperature, and from it one for each row.

Without views the objective is a function of one number. It may have several minima, so log T is searched on a grid over
[log 0.1, log 10], which is then narrowed around its best point, again and again. With views a small network starts at
that temperature and is trained by Adam on four fifths of the rows, all at once. The weights under which the loss of the
last fifth is least are kept: where views say nothing, these are the weights of the start.

The split is ours: the authors' code trains for 10 epochs. Without it (`held_out=0`), 500 steps on 1,000 rows overfit.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor

from ..options.ranges import check_count, check_fields
from ..system.progress import tracked
from .calibrator import GREATEST, LEAST, Calibrator
from .inputs import labelled, prepared
from .objectives import OBJECTIVES, Objective, correct, mean_loss, row_weights


@dataclass(frozen=True)
class Training:
    """How the network of a calibrator with views is trained.

    Raises:
        ValueError: An option out of its range, or `per_batch` without a `batch_size`.
    """

    ranges: ClassVar[dict[str, str]] = {"learning_rate": "(0, inf)", "held_out": "[0, 1)"}

    steps: int = 500
    """Number of updates."""
    learning_rate: float = 0.01
    """Of Adam."""
    hidden: int = 5
    """The width of the hidden layer."""
    top: int = 4
    """How many of a row's largest classes are read of every view."""
    batch_size: int | None = None
    """Rows of an update; None for all of them."""
    held_out: float = 0.2
    """The share of rows that is not trained on and decides which weights are kept; 0 for a decision by all rows, which
    are all trained on."""
    per_batch: bool = False
    """Whether balanced weights are those of the batch, as in the authors' code, and not of all rows. A batch that is
    all correct, where theirs divides by 0, counts with equal weights."""
    seed: int = 0
    """Of the first layer's weights, of the rows that are held out, and of the order of the others."""

    def __post_init__(self) -> None:
        check_fields(self, self.ranges)
        for name in ("steps", "hidden", "top"):
            check_count(name, getattr(self, name), 1)
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size, 1)
        elif self.per_batch:
            raise ValueError("per_batch is True, but batch_size is None: all rows are one batch, set a batch_size")


def fit(
    scores: Any,
    labels: Any,
    views: Any = None,
    objective: str | Objective = "ca",
    *,
    balanced: bool | None = None,
    training: Training | None = None,
) -> Calibrator:
    """A calibrator for a classifier, from its scores of rows that it was not trained on.

        fit(scores, labels, objective="ce")                      temperature scaling
        fit(scores, labels, views)                               correctness-aware, with a temperature for every row

    Args:
        scores: Logits [M, K]; one score a row, [M] or [M, 1], is the log-odds of class 1 against class 0.
        labels: The class of each row [M]; rows labelled -100 are left out.
        views: Logits of V changed copies of every row [V, M, K], such as rotated images, texts in other formats, or
            passes with dropout. Their order is that of later calls.
        objective: A name of `OBJECTIVES`, or a function of calibrated logits [M, K] and labels [M] that returns [M].
        balanced: Whether correct and wrong rows count the same in total; None for yes under 'ca', else no.
        training: How the network is trained; None for the defaults of `Training`. Only with views.

    Returns:
        The calibrator, in float64, without gradients.

    Raises:
        ValueError: Shapes that do not fit, values that are not finite, an unknown objective, or `training` without
            views, which are fitted exactly.
    """
    loss = _objective(objective)
    z, v, outputs = prepared(scores, views)
    if v is None and training is not None:
        raise ValueError(f"training is {training}, but without views one temperature is fitted exactly: leave it out")
    y, kept = labelled(labels, z)
    z, v = z[kept].detach(), None if v is None else v[:, kept].detach()
    balanced = objective == "ca" if balanced is None else balanced
    if (shape := loss(z, y).shape) != y.shape:
        raise ValueError(f"objective returns {list(shape)} for {len(y)} rows: return the loss of each row")
    weights = row_weights(correct(z, y), _checked_balance(balanced, correct(z, y), v is not None))
    temperature = best_temperature(lambda t: mean_loss(loss(z / t, y), weights))
    training = training or Training()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        views_count = 0 if v is None else len(v)
        calibrator = Calibrator(outputs, views_count, training.hidden, training.top, temperature).to(z.device)
    if v is not None:
        _train(calibrator, Rows(z, y, calibrator.features(z, v), weights, loss), balanced, training)
    return calibrator.requires_grad_(False).eval()


def best_temperature(loss: Callable[[float], Tensor], points: int = 41, rounds: int = 10) -> float:
    """The temperature in [0.1, 10] of the least loss, by a grid of log T that is narrowed around its best point.

    Args:
        loss: A function of the temperature.
        points: Points of the grid, at least 3.
        rounds: How often it is narrowed.

    Returns:
        The temperature; log T is known to (2 / (points - 1))^rounds log 100, where the loss tells it apart.
    """
    low, high = math.log(LEAST), math.log(GREATEST)
    for _ in range(rounds):
        grid = torch.linspace(low, high, points, dtype=torch.float64).tolist()
        values = [float(loss(math.exp(point))) for point in grid]
        best = min(range(points), key=values.__getitem__)
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, points - 1)]
    return min(max(math.exp(grid[best]), LEAST), GREATEST)


@dataclass(frozen=True)
class Rows:
    """What is fitted: scores [M, C], labels [M], features [M, F], weights [M], and the objective."""

    z: Tensor
    y: Tensor
    features: Tensor
    weights: Tensor
    objective: Objective

    def loss(self, calibrator: Calibrator, rows: Tensor | slice = slice(None), balanced: bool = False) -> Tensor:
        """The mean loss of some rows, under their own balanced weights or those of all rows."""
        z, y = self.z[rows], self.y[rows]
        temperatures = calibrator.log_temperatures(self.features[rows]).exp()
        weights = row_weights(correct(z, y), True) if balanced else self.weights[rows]
        return mean_loss(self.objective(z / temperatures[:, None], y), weights)

    def part(self, rows: Tensor) -> Rows:
        """Some of the rows, by their numbers, with the weights that they have among all."""
        return Rows(self.z[rows], self.y[rows], self.features[rows], self.weights[rows], self.objective)


def _train(calibrator: Calibrator, rows: Rows, balanced: bool, training: Training) -> None:
    generator = torch.Generator().manual_seed(training.seed)
    mixed = torch.randperm(len(rows.y), generator=generator).to(rows.y.device)
    held = round(len(mixed) * training.held_out)
    trained, judged = (rows.part(mixed[held:]), rows.part(mixed[:held])) if held else (rows, rows)
    optimizer = torch.optim.Adam(calibrator.parameters(), lr=training.learning_rate)
    best, state = math.inf, {name: value.clone() for name, value in calibrator.state_dict().items()}
    bar = tracked(
        _batches(len(trained.y), training, generator),
        "calibrating",
        total=training.steps,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar as batches:
        for batch, ends in batches:
            if ends:
                with torch.no_grad():
                    now = float(judged.loss(calibrator))
                if now < best:
                    best, state = now, {name: value.clone() for name, value in calibrator.state_dict().items()}
            if batch is None:
                break
            optimizer.zero_grad()
            trained.loss(calibrator, batch, balanced and training.per_batch).backward()
            optimizer.step()
    calibrator.load_state_dict(state)


def _batches(
    count: int, training: Training, generator: torch.Generator
) -> Iterator[tuple[Tensor | slice | None, bool]]:
    """The rows of every update, and whether weights are judged before it, once an epoch; at last None and True."""
    size = min(training.batch_size or count, count)
    order: list[Tensor] = []
    for _ in range(training.steps):
        if size == count:
            yield slice(None), True
            continue
        fresh = not order
        if fresh:
            order = list(torch.randperm(count, generator=generator).split(size))
        yield order.pop(), fresh
    yield None, True


def _objective(objective: str | Objective) -> Objective:
    if callable(objective):
        return objective
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}: choose one of {', '.join(OBJECTIVES)}, or pass a function")
    return OBJECTIVES[objective]


def _checked_balance(balanced: bool, right: Tensor, has_views: bool) -> bool:
    """Whether weights are balanced; warns where they cannot be, or pull confidence away from accuracy."""
    if not isinstance(balanced, bool):
        raise ValueError(f"balanced is {balanced!r}: choose True, False or None")
    if balanced and (right.all() or not right.any()):
        warnings.warn(
            f"all {len(right)} predictions are {'correct' if right.all() else 'wrong'}, so they cannot be balanced over"
            " correctness: they count equally",
            stacklevel=3,
        )
        return False
    if balanced and not has_views:
        warnings.warn(
            "balanced without views pulls confidence towards 1/2 whatever the accuracy is: compare the ECE in `report`,"
            " pass views, or set balanced=False",
            stacklevel=3,
        )
    return balanced

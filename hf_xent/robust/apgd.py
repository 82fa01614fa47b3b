"""APGD: projected gradient ascent with momentum, whose steps are halved where they stop helping.

    ahead   = project(x_k + size step(grad f(x_k)))
    x_{k+1} = project(x_k + .75 (ahead - x_k) + .25 (x_k - x_{k-1})),   size = 2 epsilon at first
    checkpoints w_j = ceil(p_j steps),   p_0 = 0,  p_1 = .22,  p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06)

At a checkpoint the size is halved, and the ascent goes on from the best point, if fewer than .75 of the steps since
the last one have increased f, or if the best f is that of the last checkpoint, at which the size was not halved. An
increase of the first step after such a return is one over the best point.

    f = CE(z, y)                                                                      loss 'ce'
    f = -(z_y - max_{k != y} z_k) / (z_(1) - z_(3))                                   loss 'dlr'
    f = -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)                                  loss 'targeted'

with z_(i) the i-th largest logit. 'targeted' is APGD-T: a run for each of the classes t whose logits are the largest of
the others before the attack. `steps` are shared between these runs, whose number is lowered until each has 10, and to
the number of other classes. AutoAttack's 9 targets of 100 steps are 900 steps. With fewer than 3 ('dlr') or 4 classes
('targeted') there is nothing to divide by, and f is the margin above the line.

Source: Croce and Hein 2020, Reliable evaluation of adversarial robustness, ICML, arXiv:2003.01690, Algorithm 1.
Relations: `pgd` has steps of one size; `pma_plus` is `pma`, then APGD-T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..options.ranges import check_count
from .ascent import At, Found, Walk, ascend
from .ball import TINY, Ball
from .base import Attack, flipped, generators, in_turn, margins, others, shares
from .inputs import Target

FIRST, SHORTER, SHORTEST = 22, 3, 6
"""Percent of the steps: up to the first checkpoint, and how much shorter the spans become."""
MOMENTUM, RISES = 0.75, 0.75
LEAST_STEPS = 10
"""Of each target."""
Value = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [R, K], labels [R], rows [R]) -> f [R]."""


@dataclass(frozen=True)
class APGD(Attack):
    """Projected gradient ascent that sets its own steps; see the module's docstring."""

    loss: str = "ce"
    """'ce', 'dlr' or 'targeted'."""
    targets: int = 9
    """For 'targeted', the number of classes that are tried, at most."""

    def __post_init__(self) -> None:
        check_count("targets", self.targets, 1)
        if self.loss not in ("ce", "dlr", "targeted"):
            raise ValueError(f"loss is {self.loss!r}: choose ce, dlr or targeted")
        super().__post_init__()

    def find(self, target: Target, ball: Ball, steps: int, seed: int) -> Found:
        """As `Attack.find`."""
        if self.loss == "ce":
            return self.run(target, ball, cross_entropy, steps, (seed, 0))
        if self.loss == "dlr":
            return self.run(target, ball, dlr, steps, (seed, 0))
        before, passes = target.before, 0
        if before is None:
            every = torch.arange(len(target.labels), device=target.labels.device)
            with torch.no_grad():
                before, passes = target.logits(target.center(), every), len(every)
        count = min(self.targets, before.shape[1] - 1, max(1, steps // LEAST_STEPS))
        classes = others(before, target.labels).topk(count).indices.T  # [count, B]
        parts = enumerate(zip(classes, shares(steps, count), strict=True))
        runs = [partial(self._towards, classes=each, steps=part, seed=(seed, i)) for i, (each, part) in parts]
        found = in_turn(target, ball, runs, self.leave)
        return found._replace(passes=found.passes + passes)

    def run(self, target: Target, ball: Ball, value: Value, steps: int, seed: tuple[int, int]) -> Found:
        """One run on an objective, with a seed of the attack and the number of the run."""

        def objective(step: int, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits, labels = target.logits(x, rows), target.labels[rows]
            return value(logits, labels, rows), flipped(logits.detach(), labels)

        x = target.center()
        start = ball.start(x, generators(x, *seed))
        return ascend(objective, x, ball, Adaptive(steps, ball.radius), start, best=True, leave=self.leave)

    def _towards(
        self, target: Target, ball: Ball, rows: Tensor, *, classes: Tensor, steps: int, seed: tuple[int, int]
    ) -> Found:
        """A run towards a class for each row."""
        wanted = classes[rows]
        return self.run(target, ball, lambda z, labels, left: dlr_towards(z, labels, wanted[left]), steps, seed)


class Adaptive(Walk):
    """The steps of APGD; see the module's docstring.

    Args:
        steps: Their number.
        radius: Of the ball, in units.
    """

    def __init__(self, steps: int, radius: float):
        super().__init__([2 * radius] * steps)
        self.checkpoints = checkpoints(steps)
        self.state: dict[str, Tensor] = {}
        """Of each row that is left [R, ...]."""

    def next(self, at: At, ball: Ball, center: Tensor) -> Tensor:
        """As `Walk.next`."""
        x, gradient = (at.x, at.gradient) if at.step == 0 else self._watched(at)
        if at.step == 0:
            self._begin(at)
        state = self.state
        ahead = ball.project(x + ball.step(gradient, _beside(state["size"], x)), center)
        if at.step:
            ahead = ball.project(x + MOMENTUM * (ahead - x) + (1 - MOMENTUM) * (x - state["x"]), center)
        state["x"] = x
        return ahead

    def keep(self, kept: Tensor) -> None:
        """As `Walk.keep`."""
        self.state = {name: value[kept] for name, value in self.state.items()}

    def _begin(self, at: At) -> None:
        none = torch.zeros_like(at.values)
        self.state = {
            "size": none + self.sizes[0],
            "rises": none,
            "value": at.values,  # f where the next step starts
            "best": at.values,
            "best_x": at.x,
            "best_gradient": at.gradient,
            "best_before": at.values,  # at the last checkpoint
            "halved": none.bool(),  # there
        }

    def _watched(self, at: At) -> tuple[Tensor, Tensor]:
        """Remembers the point; the point and the gradient from which the ascent goes on."""
        state = self.state
        better = at.values > state["best"]
        state["rises"] = state["rises"] + (at.values > state["value"])
        state["value"], state["best"] = at.values, at.values.where(better, state["best"])
        state["best_x"] = at.x.where(_beside(better, at.x), state["best_x"])
        state["best_gradient"] = at.gradient.where(_beside(better, at.x), state["best_gradient"])
        if at.step not in self.checkpoints:
            return at.x, at.gradient
        since = at.step - max(w for w in (0, *self.checkpoints) if w < at.step)
        stuck = ~state["halved"] & (state["best"] <= state["best_before"])
        halved = (state["rises"] < RISES * since) | stuck
        state |= {"halved": halved, "best_before": state["best"], "rises": torch.zeros_like(state["rises"])}
        state["size"] = state["size"].where(~halved, state["size"] / 2)
        state["value"] = state["best"].where(halved, state["value"])
        back = _beside(halved, at.x)
        return state["best_x"].where(back, at.x), state["best_gradient"].where(back, at.gradient)


def checkpoints(steps: int) -> list[int]:
    """The points after which the size may be halved: w_1, w_2, ... below the number of steps."""
    before, share, found = 0, FIRST, []
    while share < 100:
        found.append(-(-share * steps // 100))  # rounded up, of whole numbers
        before, share = share, share + max(share - before - SHORTER, SHORTEST)
    return sorted({w for w in found if w < steps})


def cross_entropy(logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """The cross-entropy of the label [R]."""
    return F.cross_entropy(logits, labels, reduction="none")


def dlr(logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    """The difference of logits ratio [R]; the negative margin of two classes."""
    margin = -margins(logits, labels)
    if logits.shape[-1] < 3:
        return margin
    first, _, third = logits.topk(3).values.unbind(-1)
    return margin / (first - third + TINY)


def dlr_towards(logits: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """The difference of logits ratio towards a class [R]; the negative margin to it of fewer than four classes."""
    right, wanted = (logits.gather(-1, ids[:, None]).squeeze(-1) for ids in (labels, classes))
    if logits.shape[-1] < 4:
        return wanted - right
    first, _, third, fourth = logits.topk(4).values.unbind(-1)
    return (wanted - right) / (first - (third + fourth) / 2 + TINY)


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """Values [R] in a shape that broadcasts to x [R, ...]."""
    return values.view(-1, *[1] * (x.ndim - 1))

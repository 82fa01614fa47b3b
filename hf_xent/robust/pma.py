"""PMA: ascent on the margin of probabilities, first one-sided, then whole, by steps that shrink from 2 epsilon twice.

    q = softmax(z(x')),  a = q_y,  b = max_{k != y} q_k
    ascend on a (step 0);  -a or b (first half of the steps);  b - a (second half)
    size_i = epsilon (1 + cos(2 pi (i - 1) / S)) up to i = S / 2, then epsilon (1 + cos(2 pi (i - S / 2 - 1) / S))

A run has two phases, with -a and with b in the first half, each from a random point of the ball and for the rows that
are still right. `steps` are shared between the phases of all restarts: the paper's two phases of S = 100 are 200 steps.
Step 0 moves towards the label, as in the authors' code; `towards=False` leaves that out. b < a exactly where the logit
of the label is the largest.

A sign step does not change if its gradient is divided by 1 - a, and then it does not vanish where a model is sure, in
float16 neither. With m = z_y - log sum_{k != y} exp(z_k) and r = b / (1 - a) the objectives have the gradients

    grad a / (1 - a) = a grad m,    grad b / (1 - a) = grad r - a r grad m

Source: Xie et al. 2024, arXiv:2411.15210.
Relations: `pgd` ascends on the cross-entropy; `pma_plus` goes on with `apgd` where this attack has failed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..options.ranges import check_count
from .ascent import Found, ascend
from .ball import Ball
from .base import Attack, flipped, generators, in_turn, others, shares
from .inputs import Target

PHASES = 2


@dataclass(frozen=True)
class PMA(Attack):
    """Ascent on the margin of probabilities; see the module's docstring."""

    restarts: int = 1
    """How often both phases are done, each from another random point."""
    towards: bool = True
    """Whether step 0 goes towards the label, as in the authors' code; False starts with step 1's objective."""

    def __post_init__(self) -> None:
        check_count("restarts", self.restarts, 1)
        super().__post_init__()

    def find(self, target: Target, ball: Ball, steps: int, seed: int) -> Found:
        """As `Attack.find`."""
        parts = shares(steps, PHASES * self.restarts)
        runs = [partial(self.phase, steps=part, run=run, seed=seed) for run, part in enumerate(parts)]
        return in_turn(target, ball, runs, self.leave)

    def phase(self, target: Target, ball: Ball, rows: Tensor, *, steps: int, run: int, seed: int) -> Found:
        """One phase: an even run has -a in the first half of its steps, an odd one b."""

        def objective(step: int, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits, labels = target.logits(x, rows), target.labels[rows]
            a, b = probabilities(logits, labels)
            if step == 0 and self.towards:
                value = a
            elif step < steps / 2:
                value = b if run % PHASES else -a
            else:
                value = b - a
            return value, flipped(logits.detach(), labels)

        x = target.center()
        start = ball.start(x, generators(x, seed, run))
        return ascend(objective, x, ball, sizes(ball.radius, steps), start, leave=self.leave)


def sizes(radius: float, steps: int) -> list[float]:
    """The sizes of the steps of a phase."""
    half = steps / 2
    passed = [i - 1 if i <= half else i - half - 1 for i in range(steps)]
    return [radius * (1 + math.cos(math.pi * since / half)) for since in passed]


def probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What has the gradients of the probability of the label and of the largest other one, divided by 1 - a.

    Args:
        logits: [R, K].
        labels: Ids of classes [R].

    Returns:
        Two tensors [R], whose values mean nothing; see the module's docstring.
    """
    rest = others(logits, labels)
    margin = logits.gather(-1, labels[:, None]).squeeze(-1) - rest.logsumexp(-1)
    largest = rest.softmax(-1).amax(-1)
    a = margin.detach().sigmoid()
    return a * margin, largest - a * largest.detach() * margin

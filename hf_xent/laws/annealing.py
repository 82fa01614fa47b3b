"""The loss along a whole schedule of the learning rate: two areas under it tell what was learned and what was annealed.

    L(s) = L0 + A S1(s)^-alpha - C S2(s)    and with sizes + B N^-beta

S1 is the sum of the learning rates to step s, S2 the sum of the annealing momentum: `hf_xent.laws.sums`.

Source: Tissue et al. 2024, Scaling Law with Learning Rate Annealing, arXiv:2408.11029.
Relations: MultiPowerLaw has a term per decay instead of one linear area. This law is not invariant to appended steps
    of learning rate zero, and a schedule multiplied by a factor above 1 always looks better: do not optimize with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import nan
from typing import ClassVar

import numpy as np

from ..options.ranges import check_flag, check_number
from .base import COEFFICIENT, EXPONENT, Bounds, Counts, Features, Starts
from .schedules import ScheduleLaw, sums


@dataclass(frozen=True)
class AnnealingLaw(ScheduleLaw):
    """`L0 + A S1^-alpha - C S2`, nats, at steps of a schedule; `+ B params^-beta` with `by_size`.

    Raises:
        ValueError: A field is out of its range.
    """

    L0: float = nan
    """The loss in the limit, nats."""
    A: float = nan
    """The coefficient of the sum of learning rates."""
    alpha: float = nan
    """Its exponent."""
    C: float = nan
    """The coefficient of the annealing area."""
    B: float = nan
    """The coefficient of the size, with `by_size`."""
    beta: float = nan
    """Its exponent, with `by_size`."""
    decay: float = field(default=0.999, kw_only=True)
    """0 <= decay < 1: the factor of the annealing momentum from step to step; a fit does not change it."""
    by_size: bool = field(default=False, kw_only=True)
    """Whether the law has the term of the size; it needs curves of three sizes."""

    bounds: ClassVar[Bounds] = {
        **dict.fromkeys(("L0", "A", "C", "B"), COEFFICIENT),
        **dict.fromkeys(("alpha", "beta"), EXPONENT),
    }
    starts: ClassVar[Starts] = {"alpha": (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4), "beta": (0.1, 0.2, 0.4, 0.8)}

    def __post_init__(self) -> None:
        check_number(self, "decay", "[0, 1)")
        check_flag(self, "by_size")
        super().__post_init__()

    @property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        """`lr`, `step`, and `params` with `by_size`."""
        return ("lr", "step", "params") if self.by_size else ("lr", "step")

    @property
    def parameters(self) -> tuple[str, ...]:
        """Four, or six with `by_size`."""
        return super().parameters[: 6 if self.by_size else 4]

    @property
    def linear(self) -> tuple[str, ...]:  # type: ignore[override]
        """The coefficients."""
        return ("L0", "A", "C", "B") if self.by_size else ("L0", "A", "C")

    @property
    def distinct(self) -> Counts:  # type: ignore[override]
        """Three sizes, if it has them."""
        return {"params": 3} if self.by_size else {}

    def of_schedule(self, lr: np.ndarray, step: np.ndarray) -> Features:
        """S1 and S2 at the steps, [rows] each."""
        of = sums(lr, self.decay)
        return {"s1": of.s1[step - 1], "s2": of.s2[step - 1]}

    def of(self, features: Features) -> np.ndarray:
        """The formula on `s1`, `s2` and, with `by_size`, `params`."""
        loss = self.L0 + self.A * features["s1"] ** -self.alpha - self.C * features["s2"]
        return loss + self.B * features["params"] ** -self.beta if self.by_size else loss

    def describe(self) -> str:
        """The formula with its numbers, in one line."""
        size = f" + {self.B:.5g} params^-{self.beta:.4g}" if self.by_size else ""
        return f"L = {self.L0:.5g} + {self.A:.5g} S1^-{self.alpha:.4g} - {self.C:.5g} S2{size}"

"""What a comparison over seeds is to decide, written down before it runs: the difference that counts, and the verdict.

    claim = Claim("EMO", "mauve", margin=0.02)          # EMO's MAUVE is higher than the baseline's, by 0.02 or more
    detectable(spread=0.012, seeds=5)                   # 0.021: what five seeds find in four of five studies
    claim.verdict(study)                                # "better", "better, by less than counts", "worse", ...

The interval [low, high] of the mean paired difference (Student's, 95 %, signed so that more is better) decides:

    better: low > 0      worse: high < 0      no such effect: high < margin      undecided: neither

"No such effect" means that an improvement of the margin or more is excluded. If that is so and low > 0, the verdict is
"better, by less than counts".
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isnan
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import brentq
from scipy.stats import nct
from scipy.stats import t as student

if TYPE_CHECKING:
    from .study import Study

BETTER, SMALL, WORSE, NONE, UNDECIDED = (
    "better", "better, by less than counts", "worse", "no such effect", "undecided",
)  # fmt: skip


def detectable(spread: float, seeds: int, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest true difference that a paired t-test over seeds finds with some power.

        P(|T| > t_{1 - level/2, n-1}) = power        T ~ noncentral t, n - 1 degrees of freedom, difference sqrt(n) / sd

    Args:
        spread: Standard deviation of the paired differences, of a pilot.
        seeds: Number of pairs n.
        power: The probability that the test finds the difference.
        level: The level of the two-sided test.

    Returns:
        The difference, in the units of `spread`; infinite for fewer than two seeds.

    Raises:
        ValueError: If `spread` is negative, or `power` is not between `level` and 1.
    """
    if not spread >= 0:
        raise ValueError(f"spread is {spread}: give the standard deviation of differences, which is not negative")
    if not level < power < 1:
        raise ValueError(f"power is {power}: choose a probability above the level, {level}, and below 1")
    if seeds < 2:
        return inf
    bound = float(student.ppf(1 - level / 2, seeds - 1))

    def excess(shift: float) -> float:
        missed = nct.cdf(-bound, seeds - 1, shift)  # NaN far from zero, where it is 0
        return float(nct.sf(bound, seeds - 1, shift) + np.nan_to_num(missed)) - power

    high = 1.0
    while excess(high) < 0:
        high *= 1.5
    return float(brentq(excess, 0.0, high)) * spread / seeds**0.5


@dataclass(frozen=True)
class Claim:
    """One question to a study, with the smallest answer that counts.

    Args:
        arm: The arm it is about.
        metric: The metric that decides.
        margin: The smallest improvement worth acting on, in the metric's units; positive.
        higher: Whether a higher value is better.
        against: The arm it is compared with; None for the study's baseline.
    """

    arm: str
    metric: str
    margin: float
    higher: bool = True
    against: str | None = None

    def __post_init__(self) -> None:
        if not self.margin > 0:
            raise ValueError(f"margin is {self.margin}: give the smallest improvement that counts, above 0")

    def interval(self, study: Study) -> tuple[float, float]:
        """The 95 % interval of the mean improvement over common seeds; (nan, nan) for fewer than two."""
        difference = study.difference(self.arm, self.metric, self.against)
        if difference is None or isnan(difference[1]):
            return (float("nan"), float("nan"))
        center = difference[0] if self.higher else -difference[0]
        return center - difference[1], center + difference[1]

    def spread(self, study: Study) -> float:
        """The standard deviation of the paired differences in a study; NaN for fewer than two seeds."""
        gaps = study.gaps(self.arm, self.metric, self.against)
        return float(np.std(gaps, ddof=1)) if len(gaps) > 1 else float("nan")

    def verdict(self, study: Study) -> str:
        """What the study says: one of `BETTER`, `SMALL`, `WORSE`, `NONE` and `UNDECIDED`."""
        low, high = self.interval(study)
        if low > 0:
            return BETTER if high >= self.margin else SMALL
        if high < 0:
            return WORSE
        return NONE if high < self.margin else UNDECIDED

"""A judge whose probabilities are right as often as they say, from pairs whose better response is known.

    z(a, b) = logit p(a, b)        p of both orders (`judging.both_orders`), within [eps, 1 - eps]
    q(a, b) = sigma(z / T)         T of a `hf_xent.calibration.Calibrator`

q(a, b) + q(b, a) = 1 as for p: z changes its sign with the order, and T does not change, since what it is read from is
the same. Every judge among the views has one number in each order, logit s(a, b) and -logit s(b, a), of which the one
that is less sure of p's verdict comes first. So a judge that is a view of itself tells how far its two orders agree.

    judge = ModelJudge(model, tokenizer)
    calibrated = CalibratedJudge.fit(judge, rows, better, worse, views=(judge,))

Source: ours, of arXiv:2404.13016 and the two orders of `judging`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import calibration
from ..options.ranges import is_number
from .judging import Judge, Row, probabilities

EPS = 1e-3


@dataclass
class CalibratedJudge:
    """A judge around another one, for which `judging.both_orders` changes nothing; see the module's docstring.

    Args:
        judge: The judge whose verdicts are kept.
        calibrator: What gives every pair its temperature.
        views: The judges that the temperature is read from, in the order of the fit; none for one temperature.
        eps: Probabilities are clipped to [eps, 1 - eps] first.

    Raises:
        ValueError: eps is outside of (0, 1/2), or there are not as many views as the calibrator has.
    """

    judge: Judge
    calibrator: calibration.Calibrator
    views: Sequence[Judge] = ()
    eps: float = EPS

    def __post_init__(self) -> None:
        _check_eps(self.eps)
        if 2 * len(self.views) != self.calibrator.sizes["views"]:
            raise ValueError(
                f"views has {len(self.views)} judges, but the calibrator has {self.calibrator.sizes['views']} views,"
                " two for each judge: pass those of the fit"
            )

    @classmethod
    def fit(
        cls,
        judge: Judge,
        rows: Sequence[Row],
        better: Sequence[str],
        worse: Sequence[str],
        *,
        views: Sequence[Judge] = (),
        eps: float = EPS,
        **options: Any,
    ) -> CalibratedJudge:
        """A judge that is calibrated on pairs whose better response is known, and which it was not made from.

        Args:
            judge: The judge.
            rows: n rows of a data set, with their prompts.
            better: The better response to each prompt.
            worse: The worse response to each prompt.
            views: Judges that the temperature is read from, such as ones with other questions, or the judge itself.
            eps: Probabilities are clipped to [eps, 1 - eps].
            **options: Those of `calibration.fit`: objective, balanced, training.

        Raises:
            ValueError: As `calibration.fit`, or a judge that did not return n probabilities.
        """
        _check_eps(eps)
        z, seen = logits(judge, views, (rows, better, worse), eps)
        calibrator = calibration.fit(z, torch.ones(len(z), dtype=torch.long), seen, **options)
        return cls(judge, calibrator, views, eps)

    def __call__(self, rows: Sequence[Row], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """q(first, second) [n], float64; every judge is asked in both orders."""
        if not rows:
            return torch.empty(0, dtype=torch.float64)
        return self.calibrator(*logits(self.judge, self.views, (rows, first, second), self.eps))[:, 1]


def logits(
    judge: Judge, views: Sequence[Judge], pairs: tuple[Sequence[Row], Sequence[str], Sequence[str]], eps: float = EPS
) -> tuple[Tensor, Tensor | None]:
    """z [n] of pairs (rows, first, second), and two numbers of every judge among the views [2 V, n], None without.

    A judge that occurs again is asked once.
    """
    rows, first, second = pairs
    asked: dict[int, Tensor] = {}  # by identity: a judge need not be hashable

    def orders(asking: Judge) -> Tensor:  # [2, n], both of the first response
        if id(asking) not in asked:
            ab, ba = (probabilities(asking(rows, *shown), len(rows)) for shown in ((first, second), (second, first)))
            asked[id(asking)] = torch.stack([ab, 1 - ba])
        return asked[id(asking)]

    z = orders(judge).mean(0).clamp(eps, 1 - eps).logit()
    if not views:
        return z, None
    side = torch.where(z >= 0, 1.0, -1.0)
    seen = [side * (side * orders(view).clamp(eps, 1 - eps).logit()).sort(0).values for view in views]
    return z, torch.cat(seen)


def _check_eps(eps: float) -> None:
    if not is_number(eps, "(0, 0.5)"):
        raise ValueError(f"eps is {eps!r}: choose a number above 0 and below 1/2")

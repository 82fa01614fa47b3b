"""Forecast a training run from the curves of other runs: another schedule of the learning rate, or a longer one.

    found = forecast(["runs/constant.csv", "runs/cosine.csv"], "warmup_stable_decay:num_decay_steps=200", steps=2000)
    found.end                                    # the loss at its last step, with its band

The files are those of `hf_xent.callbacks.curve.CurveCallback`, or others that `hf_xent.laws.read` reads. The learning
rate of every step comes from `transformers.get_scheduler`, as the trainer would set it. The law is fitted to the losses
after the warm-up, on which it says nothing, each the mean of successive steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from ..laws import LAWS, Curve, Fit, Law, fit, get, read
from ..laws.schedules import ScheduleLaw, after_warmup
from ..models.quiet import quiet_loading
from ..options.ranges import check_count, is_number
from ..registry import parse

Source = str | PathLike[str] | Curve
WITHOUT_FORECAST = {"reduce_lr_on_plateau": "follows evaluations", "greedy": "follows losses"}
"""Schedules of transformers that depend on more than the step, and on what."""


@dataclass(frozen=True)
class Schedule:
    """A schedule of transformers for a run that is planned.

    Raises:
        ValueError: A value is out of its range, or transformers has no such schedule or does not accept its options.
    """

    name: str
    """A schedule by the name that `lr_scheduler_type` takes, such as 'cosine'."""
    steps: int
    """Optimizer steps of the run."""
    peak: float
    """The learning rate that the schedule multiplies, `learning_rate` of the trainer."""
    warmup: int = 0
    """Steps of warm-up."""
    options: dict[str, Any] = field(default_factory=dict)
    """`lr_scheduler_kwargs` of the trainer."""

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        check_count("warmup", self.warmup, 0)
        if not is_number(self.peak, "(0, inf)"):
            raise ValueError(f"peak is {self.peak!r}: choose a learning rate > 0")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup is {self.warmup} of {self.steps} steps: a law says nothing of a warm-up alone")

    @classmethod
    def like(
        cls, curves: Sequence[Curve], text: str, steps: int, *, peak: float | None = None, warmup: int | None = None
    ) -> Schedule:
        """The schedule of a text such as 'cosine' or 'warmup_stable_decay:num_decay_steps=200'.

        Args:
            curves: Runs whose peak and warm-up it has, unless they are given.
            text: The name of the schedule, and its options after a colon.
            steps: Its steps.
            peak: Its learning rate.
            warmup: Its steps of warm-up.

        Returns:
            The schedule.

        Raises:
            ValueError: The curves do not share what is not given, or the text is not of this form.
        """
        name, _, written = text.partition(":")
        peak = _shared("peak", [float(curve.lr.max()) for curve in curves]) if peak is None else peak
        warmup = int(_shared("warmup", [after_warmup(curve.lr) for curve in curves])) if warmup is None else warmup
        return cls(name, steps, peak, warmup, parse(written))

    def rates(self) -> np.ndarray:
        """The learning rate that every step uses, before the scheduler moves on, [steps].

        Raises:
            ValueError: transformers has no such schedule, or it depends on more than the step.
        """
        import torch

        with quiet_loading():
            from transformers import get_scheduler

        if self.name in WITHOUT_FORECAST:
            raise ValueError(f"schedule is {self.name!r}, which {WITHOUT_FORECAST[self.name]}: choose one of the step")
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.peak)
        try:
            scheduler = get_scheduler(self.name, optimizer, self.warmup, self.steps, self.options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"schedule is {self.name!r} with {self.options}: {error}") from error
        rates = []
        for _ in range(self.steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return np.array(rates, dtype=float)


class Outlook(NamedTuple):
    """The forecast of a run after its warm-up; the band is that of the fit's bootstrap, 95 %."""

    schedule: Schedule
    lr: np.ndarray
    """Of every step, [steps]."""
    step: np.ndarray
    """The steps of the forecast, [rows]."""
    loss: np.ndarray
    """Nats per token, [rows]."""
    low: np.ndarray
    """The band, [rows]."""
    high: np.ndarray
    """The band, [rows]."""
    fit: Fit
    """The law that was fitted."""

    @property
    def end(self) -> tuple[float, float, float]:
        """The loss at the last step, and its band."""
        return float(self.loss[-1]), float(self.low[-1]), float(self.high[-1])

    def at(self, curve: Curve) -> np.ndarray:
        """The forecast at the steps of a curve, [rows]; nan before the forecast begins."""
        return np.interp(curve.step, self.step, self.loss, left=np.nan)


def forecast(
    curves: Source | Sequence[Source],
    schedule: str | Schedule,
    steps: int | None = None,
    law: str | Law = "annealing",
    *,
    points: int = 100,
    bootstrap: int = 200,
    seed: int = 0,
) -> Outlook:
    """Fit a law to curves, and predict the losses of a run that has another schedule or more steps.

    The band is what noise leaves open in the parameters. It has nothing of a law that does not hold: hold out a curve.

    Args:
        curves: Runs that have been made, as files or as `Curve`; one of them has to decay.
        schedule: The run to predict: a `Schedule`, or the name of one with its options, as in
            'warmup_stable_decay:num_decay_steps=200', and then peak and warm-up are those of the curves.
        steps: Its optimizer steps; a `Schedule` has its own.
        law: A law of schedules, as for `hf_xent.laws.fit`; one with a size predicts for the largest of the curves.
        points: The losses of each curve that the law is fitted to, each the mean of as many steps as that takes.
        bootstrap: Draws for the band; 0 for none.
        seed: Of these draws.

    Returns:
        The forecast.

    Raises:
        ValueError: The law reads no schedule, the curves do not share peak and warm-up, or the forecast is one on which
            the law is known to fail: rates outside those of the curves, or steps at rate zero.
    """
    opened = opened_curves(curves)
    if isinstance(schedule, Schedule):
        if steps not in (None, schedule.steps):
            raise ValueError(f"steps is {steps} beside a Schedule of {schedule.steps}: set steps once")
    else:
        if steps is None:
            raise ValueError("steps is not given: give the optimizer steps of the run to predict")
        schedule = Schedule.like(opened, schedule, steps)
    lr = schedule.rates()
    found = fitted(opened, law, points=points, bootstrap=bootstrap, seed=seed)
    step = np.arange(after_warmup(lr) + 1, len(lr) + 1)
    sizes = {"params": params_of(opened)} if "params" in found.law.columns else {}
    return Outlook(schedule, lr, step, *found.predict(lr=lr, step=step, **sizes), found)


def opened_curves(curves: Source | Sequence[Source]) -> list[Curve]:
    """Curves from files; those that are curves already are returned as they are."""
    given = [curves] if isinstance(curves, str | PathLike | Curve) else list(curves)
    if not given:
        raise ValueError("curves is empty: give the files of one run or more")
    return [curve if isinstance(curve, Curve) else read(curve) for curve in given]


def fitted(curves: Sequence[Curve], law: str | Law = "annealing", *, points: int = 100, **options: Any) -> Fit:
    """A law of schedules fitted to curves after their warm-up, with `points` mean losses of each.

    Args:
        curves: The runs.
        law: As for `forecast`.
        points: As for `forecast`.
        **options: As for `hf_xent.laws.fit`.

    Returns:
        The fit.

    Raises:
        ValueError: The law reads no schedule, or `hf_xent.laws.fit` refuses the curves.
    """
    check_count("points", points, 2)
    law = get(law)
    if not reads_schedules(law):
        names = ", ".join(schedule_laws())
        raise ValueError(f"law is {type(law).__name__}, which does not read a schedule: choose one of {names}")
    return fit(law, [thinned(curve, points) for curve in curves], **options)


def thinned(curve: Curve, points: int) -> Curve:
    """The curve after its warm-up, as about so many mean losses of successive steps."""
    after = curve.after(after_warmup(curve.lr))
    if not len(after):
        raise ValueError(f"curve {curve.name!r} has no losses after its warm-up: give a longer run")
    return after.averaged(max(1, len(after) // points))


def params_of(curves: Sequence[Curve]) -> float:
    """The size of the model that is predicted: the largest of the curves'."""
    return max(curve.params for curve in curves if curve.params is not None)


def schedule_laws() -> list[str]:
    """The names of the laws that read a schedule."""
    return [name for name in LAWS if issubclass(LAWS[name], ScheduleLaw)]


def reads_schedules(law: Law) -> bool:
    """Whether a law predicts from the learning rate of every step."""
    return isinstance(law, ScheduleLaw)


def _shared(what: str, values: list[float]) -> float:
    """The value that all curves have."""
    if max(values) - min(values) > 1e-6 * max(values):
        listed = ", ".join(f"{value:g}" for value in sorted({*values}))
        raise ValueError(f"{what} is {listed} in the curves: give the {what} of the run to predict")
    return values[0]

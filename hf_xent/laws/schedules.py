"""Sums of a learning-rate schedule, step by step, and what a forecast has to know of one: its range and its zeros."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy.signal import lfilter

from .base import Features, Law, first_bad, named


class Sums(NamedTuple):
    """The sums of a schedule after each of its steps, [steps] each."""

    s1: np.ndarray
    momentum: np.ndarray
    s2: np.ndarray


def sums(lr: Any, decay: float = 0.999) -> Sums:
    """Area and annealing area of a schedule: `S1_s = sum lr_i`, `S2_s = sum m_i`, both to step s.

    The annealing momentum is `m_i = decay m_(i-1) + (lr_(i-1) - lr_i)`, with m_1 = 0. In a warm-up it is negative.

    Args:
        lr: The learning rate of every step, warm-up included, [steps].
        decay: The factor lambda of the momentum.

    Returns:
        S1, m and S2 after each step.

    Source: Tissue et al. 2024, Scaling Law with Learning Rate Annealing, arXiv:2408.11029.
    """
    lr = schedule(lr)
    momentum = lfilter([1.0], [1.0, -decay], -np.diff(lr, prepend=lr[:1]))
    return Sums(np.cumsum(lr), momentum, np.cumsum(momentum))


def schedule(lr: Any) -> np.ndarray:
    """A learning rate per step as an array, [steps]. Raises: ValueError, as not one a step, negative or all zero."""
    lr = np.asarray(lr, dtype=float)
    if lr.ndim != 1 or not lr.size:
        raise ValueError(f"lr has the shape {lr.shape}: give the learning rate of every step, one number each")
    if not np.all(np.isfinite(lr) & (lr >= 0)) or not lr.any():
        raise ValueError("lr has a value that is negative or not finite, or is zero at every step: nothing is learned")
    return lr


def steps_of(lr: np.ndarray, step: Any = None) -> np.ndarray:
    """The steps at which a loss is asked for, from 1; all, if none are given.

    Raises:
        ValueError: A step is not a whole number from 1 to the length of the schedule.
    """
    step = np.arange(1, len(lr) + 1) if step is None else np.atleast_1d(np.asarray(step, dtype=float))
    bad = ~((step >= 1) & (step <= len(lr)) & (step % 1 == 0))
    if bad.any():
        raise ValueError(
            f"step has {step[bad][0]:g}, and lr has {len(lr)} steps: give whole steps from 1, and the lr of every step"
        )
    return step.astype(int)


def after_warmup(lr: np.ndarray) -> int:
    """The index of the first step at the peak: the steps before it are the warm-up."""
    return int(np.argmax(lr >= lr.max() * (1 - 1e-9)))


def longest_run_of_zeros(lr: np.ndarray) -> int:
    """The largest number of successive steps at learning rate zero."""
    zero = np.concatenate([[0], (lr == 0).astype(int), [0]])
    edges = np.flatnonzero(np.diff(zero))
    return int((edges[1::2] - edges[::2]).max(initial=0))


class ScheduleLaw(Law):
    """Base of laws that predict from the learning rate of every step, at the steps asked for."""

    columns = ("lr", "step")

    def features(self, **columns: Any) -> Features:
        """What the formula needs of a schedule.

        Args:
            **columns: `lr`, of every step from the first, warm-up included, [steps]; `step`, at which steps to
                predict, all by default; and `params`, if the law has a size.

        Returns:
            The arrays that `of` reads.

        Raises:
            ValueError: A column is missing or does not fit.
        """
        columns.setdefault("step", None)
        if columns.get("params", 0) is None:
            del columns["params"]
        named(self, columns)
        lr = schedule(columns["lr"])
        found = dict(self.of_schedule(lr, steps_of(lr, columns["step"])))
        if "params" in columns:
            found["params"] = np.asarray(columns["params"], dtype=float)
            if not np.all(np.isfinite(found["params"]) & (found["params"] > 0)):
                raise ValueError(f"params is {first_bad(found['params'])!r}: a law needs a positive number of them")
        return found

    def of_schedule(self, lr: np.ndarray, step: np.ndarray) -> Mapping[str, np.ndarray]:
        """The sums of the schedule that the formula reads.

        Args:
            lr: Of every step, [steps].
            step: From 1, [rows].

        Returns:
            Arrays by name.
        """
        raise NotImplementedError

    def extent(self, **columns: Any) -> dict[str, tuple[float, float]]:
        """The number of `steps`, the learning rates from the peak on, the longest run of `zeros`, and the size."""
        lr = schedule(columns["lr"])
        steps, zeros = len(lr), longest_run_of_zeros(lr)
        found = {"steps": (steps, steps), "lr": (lr[after_warmup(lr) :].min(), lr.max()), "zeros": (zeros, zeros)}
        if columns.get("params") is not None:
            found["params"] = (columns["params"], columns["params"])
        return {name: (float(np.min(low)), float(np.max(high))) for name, (low, high) in found.items()}

    def check_within(self, seen: Mapping[str, tuple[float, float]], **columns: Any) -> None:
        """Refuse learning rates and runs of zeros that the fit has not seen; warn of more than three times the steps.

        One percent of the peak beyond the range is rounding of a schedule, and is accepted.

        Raises:
            ValueError: These forecasts are known to fail: the formula rewards larger rates and steps at rate zero.
        """
        at, slack = self.extent(**columns), 0.01 * seen["lr"][1]
        if at["zeros"][1] > seen["zeros"][1] + 1:
            raise ValueError(
                f"lr is zero at {at['zeros'][1]:g} successive steps, and in the fit at {seen['zeros'][1]:g}: cut them "
                "off, for nothing is learned there, and the law would predict a falling loss"
            )
        if at["lr"][0] < seen["lr"][0] - slack or at["lr"][1] > seen["lr"][1] + slack:
            raise ValueError(
                f"lr runs over {at['lr'][0]:.3g} to {at['lr'][1]:.3g}, and the fit has seen {seen['lr'][0]:.3g} to "
                f"{seen['lr'][1]:.3g}: fit also to a curve of this range (`fit.law.predict` does not check)"
            )
        if at["steps"][1] > 3 * seen["steps"][1]:
            warnings.warn(
                f"lr has {at['steps'][1]:g} steps, more than three times the {seen['steps'][1]:g} of the fit: "
                "forecasts so far ahead are not tested",
                stacklevel=3,
            )

    def check_data(self, parts: list[Mapping[str, Any]]) -> None:
        """Refuse curves whose learning rate never falls: they do not determine what a decay does.

        Raises:
            ValueError: As said, or too few sizes.
        """
        super().check_data(parts)
        rates = [schedule(part["lr"]) for part in parts]
        if all(lr[after_warmup(lr) :].min() > 0.9 * lr.max() for lr in rates):
            raise ValueError(
                f"lr never falls below 0.9 of its peak in {len(parts)} curve(s): add one with a decay, whose effect "
                f"is a parameter of {type(self).__name__}"
            )

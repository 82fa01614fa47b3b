"""What one option can be: a real number, a whole number, or one of a few values; `hf_xent.cem.space` has the table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..options.ranges import is_integer, is_number
from .families import Family, Frequencies, Gaussian

FEW = 10
"""An integer with at most so many values has a frequency for each."""


@dataclass(frozen=True)
class Real:
    """A real number.

    Args:
        low: The least value; -inf for none.
        high: The largest value; inf for none.
        log: Whether the logarithm is what is drawn and fitted.
        step: Only `low`, `low + step` ... are drawn; None for all. Not with `log`.
        mean: Where the Gaussian starts; the middle of the range by default, and needed without one.
        sd: Its standard deviation at the start, of the logarithm if `log`; needed without a range.

    Raises:
        ValueError: If the range is empty, or there is neither a range nor a start.
    """

    low: float = -math.inf
    high: float = math.inf
    log: bool = False
    step: float | None = None
    mean: float | None = None
    sd: float | None = None

    def __post_init__(self) -> None:
        _check_range(self)
        if not (math.isfinite(self.low) and math.isfinite(self.high)) and (self.mean is None or self.sd is None):
            raise ValueError(f"low is {self.low} and high is {self.high}: without a range, give mean and sd")
        if self.step is not None and not (is_number(self.step, "(0, inf)") and math.isfinite(self.low)):
            raise ValueError(f"step is {self.step!r}: choose a positive number, with a finite low")
        if self.sd is not None and not is_number(self.sd, "(0, inf)"):
            raise ValueError(f"sd is {self.sd!r}: choose a number above 0")
        if self.mean is not None and not self.low <= self.mean <= self.high:
            raise ValueError(f"mean is {self.mean!r}: choose a number from low ({self.low}) to high ({self.high})")

    @cached_property
    def family(self) -> Family:
        """The distribution of coordinates."""
        half = 0.0 if self.step is None else self.step / 2
        mean = None if self.mean is None else self.coordinate(self.mean)
        if self.log:
            return Gaussian(math.log(self.low) if self.low else -math.inf, math.log(self.high), mean, self.sd)
        return Gaussian(self.low - half, self._top() + half, mean, self.sd)

    def _top(self) -> float:
        """The largest value that steps reach."""
        if self.step is None or math.isinf(self.high):
            return self.high
        return self.low + math.floor((self.high - self.low) / self.step + 1e-9) * self.step

    def coordinate(self, value: float) -> float:
        """The value's coordinate."""
        return math.log(value) if self.log else float(value)

    def value(self, coordinate: float) -> float:
        """The value at a coordinate."""
        value = math.exp(coordinate) if self.log else float(coordinate)
        if self.step is not None:
            value = self.low + round((value - self.low) / self.step) * self.step
        return float(min(max(value, self.low), self._top()))


@dataclass(frozen=True)
class Integer:
    """A whole number.

    Args:
        low: The least value.
        high: The largest value.
        log: Whether the logarithm is what is drawn and fitted, or, for few values, what the first round is uniform in.
        step: Only `low`, `low + step` ... are drawn.

    Raises:
        ValueError: If the range is empty or has no end.
    """

    low: int
    high: int
    log: bool = False
    step: int = 1

    def __post_init__(self) -> None:
        for name in ("low", "high", "step"):
            if not is_integer(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose a whole number")
        if self.step < 1:
            raise ValueError(f"step is {self.step}: choose a whole number of at least 1")
        _check_range(self)

    @cached_property
    def _values(self) -> range:
        return range(self.low, self.high + 1, self.step)

    @property
    def _few(self) -> bool:
        return len(self._values) <= FEW

    @cached_property
    def family(self) -> Family:
        """The distribution of coordinates: of places in the list of values if they are few."""
        if self._few:
            shares = [math.log((x + 0.5) / (x - 0.5)) if self.log else 1.0 for x in self._values]
            return Frequencies(tuple(share / sum(shares) for share in shares))
        ends = self.low - self.step / 2, self._values[-1] + self.step / 2
        return Gaussian(*map(math.log, ends)) if self.log else Gaussian(*ends)

    def coordinate(self, value: int) -> float:
        """The value's coordinate."""
        if self._few:
            return float(self._values.index(value))
        return math.log(value) if self.log else float(value)

    def value(self, coordinate: float) -> int:
        """The value at a coordinate."""
        if self._few:
            return self._values[round(coordinate)]
        number = math.exp(coordinate) if self.log else coordinate
        place = round((number - self.low) / self.step)
        return self._values[min(max(place, 0), len(self._values) - 1)]


@dataclass(frozen=True, init=False)
class Categorical:
    """One of a few values without an order.

    Args:
        choices: The values: text, numbers, True, False or None.

    Raises:
        ValueError: If there are none, one occurs twice, or one is something else.
    """

    choices: tuple[Any, ...]

    def __init__(self, choices: Iterable[Any]) -> None:
        object.__setattr__(self, "choices", tuple(choices))
        if isinstance(choices, str) or not self.choices:
            raise ValueError(f"choices is {choices!r}: give a list of values")
        for place, choice in enumerate(self.choices):
            if not isinstance(choice, str | int | float | bool | None):
                raise ValueError(f"choices has {choice!r}: choose among text, numbers, True, False and None")
            if self._place(choice) != place:
                raise ValueError(f"choices has {choice!r} twice: leave one out")

    def _place(self, value: Any) -> int:
        """True is not 1 here."""
        same = (k for k, choice in enumerate(self.choices) if type(choice) is type(value) and choice == value)
        return next(same, -1)

    @cached_property
    def family(self) -> Family:
        """The distribution of places in the list."""
        return Frequencies((1 / len(self.choices),) * len(self.choices))

    def coordinate(self, value: Any) -> float:
        """The value's place in the list."""
        place = self._place(value)
        if place < 0:
            raise ValueError(f"{value!r} is none of {', '.join(map(repr, self.choices))}")
        return float(place)

    def value(self, coordinate: float) -> Any:
        """The value at a place."""
        return self.choices[round(coordinate)]


Dimension = Real | Integer | Categorical


def _check_range(dimension: Real | Integer) -> None:
    low, high = dimension.low, dimension.high
    if not (is_number(low, "[-inf, inf]") and is_number(high, "[-inf, inf]") and low < high):
        raise ValueError(f"low is {low!r} and high is {high!r}: choose two numbers, low below high")
    if dimension.log and not low > 0:
        raise ValueError(f"low is {low!r} with log=True: choose a number above 0")
    if dimension.log and dimension.step not in (None, 1):
        raise ValueError(f"step is {dimension.step!r} with log=True: leave one of them out")

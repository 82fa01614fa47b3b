"""Checks of the options of a dataclass: numbers in an interval, flags, text; any other value is a ValueError."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

INTERVAL = re.compile(r"([\[(])(\S+), (\S+)([\])])")


def check_number(owner: Any, name: str, interval: str, remedy: str = "") -> None:
    """Refuse an option that is not a number, is nan, or is outside of an interval such as '[0, 1)' or '(0, inf)'.

    Raises: ValueError that names the option, its value and what to choose.
    """
    value = getattr(owner, name)
    if not is_number(value, interval):
        raise ValueError(f"{name} is {value!r}: {remedy or f'choose a number in {interval}'}")


def check_flag(owner: Any, name: str) -> None:
    """Refuse an option that is neither True nor False. Raises: ValueError."""
    value = getattr(owner, name)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: choose True or False")


def check_integer(owner: Any, name: str, interval: str) -> None:
    """Refuse an option that is not a whole number in an interval; a whole float becomes an int.

    Raises: ValueError that names the option, its value and what to choose.
    """
    value = getattr(owner, name)
    if not (is_number(value, interval) and value % 1 == 0):
        raise ValueError(f"{name} is {value!r}: choose a whole number in {interval}")
    setattr(owner, name, int(value))


def check_count(name: str, value: Any, least: int) -> None:
    """Refuse an argument that is not a whole number, or is below `least`. Raises: ValueError, as `check_integer`."""
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} is {value!r}: choose a whole number of at least {least}")


def whole_numbers(name: str, text: str) -> list[int]:
    """The whole numbers of a list with commas between them. Raises: ValueError if it is none."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} is {text!r}: give whole numbers, with commas between them") from None


def as_number(name: str, value: Any) -> float:
    """A number, also of NumPy, or of a tensor of one element. Raises: ValueError that names what it is."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {value!r}: give one number") from None


def check_text(owner: Any, name: str) -> None:
    """Refuse an option that is not text. Raises: ValueError."""
    value = getattr(owner, name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}: write it as text")


def check_fields(owner: Any, ranges: Mapping[str, str]) -> None:
    """Refuse the fields of a dataclass that are out of their interval, or, True or False by default, are neither.

    Raises: ValueError that names the option, its value and what to choose.
    """
    for option in fields(owner):
        if option.name in ranges:
            check_number(owner, option.name, ranges[option.name])
        elif isinstance(option.default, bool):
            check_flag(owner, option.name)


def is_number(value: Any, interval: str) -> bool:
    """Whether a value is a real number in an interval; True and False are not."""
    bounds = INTERVAL.fullmatch(interval)
    if bounds is None:
        raise ValueError(f"interval is {interval!r}: write it as '[0, 1)'")
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    low, number, high = float(bounds[2]), float(value), float(bounds[3])
    above = low <= number if bounds[1] == "[" else low < number
    return above and (number <= high if bounds[4] == "]" else number < high)


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number; True and False are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)

"""Spaces of options: which values each name can take, and how they are drawn and fitted.

    Space({"learning_rate": Real(1e-5, 1e-3, log=True), "num_train_epochs": Integer(1, 3)})
    Space.parse(["learning_rate=1e-5..1e-3:log", "num_train_epochs=1..3", "lr_scheduler_type=linear|cosine"])
    Space.of(hp_space)                      a function of a trial, as transformers and optuna take it

| dimension | distribution |
|---|---|
| Real | a Gaussian, truncated to the range; of the logarithm if `log` |
| Integer | frequencies if there are at most 10 values, else a rounded Gaussian; of the logarithm if `log` |
| Categorical | frequencies |

Dimensions are drawn and fitted independently of one another: what is good only together is found if it is in enough
elites of a round, not by a covariance.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .dimensions import Categorical, Dimension, Integer, Real
from .trial import discovered


class Space(Mapping[str, Dimension]):
    """Names and their dimensions, in order.

    Args:
        dimensions: Name -> `Real`, `Integer` or `Categorical`.

    Raises:
        ValueError: If there are none, or one is something else.
    """

    def __init__(self, dimensions: Mapping[str, Dimension]) -> None:
        self._dimensions = dict(dimensions)
        if not self._dimensions:
            raise ValueError("the space has no dimensions: name at least one option")
        for name, dimension in self._dimensions.items():
            if not isinstance(dimension, Dimension):
                raise ValueError(f"{name} is {dimension!r}: choose a Real, an Integer or a Categorical")

    def __getitem__(self, name: str) -> Dimension:
        return self._dimensions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._dimensions)

    def __len__(self) -> int:
        return len(self._dimensions)

    def __repr__(self) -> str:
        return f"Space({self._dimensions!r})"

    @classmethod
    def of(cls, space: Mapping[str, Dimension] | Callable[[Any], Any] | Iterable[str]) -> Space:
        """A space from whatever describes one.

        Args:
            space: A space, a dictionary, a list of texts as `parse` reads them, or a function of a trial that calls
                `trial.suggest_float`, `suggest_int` and `suggest_categorical`, as optuna's trials have them.

        Returns:
            The space.

        Raises:
            ValueError: As the dimensions do, or for a function that asks for a name only in some trials.
        """
        if isinstance(space, Space):
            return space
        if isinstance(space, Mapping):
            return cls(space)
        return cls(discovered(space, _SUGGESTED)) if callable(space) else cls.parse(space)

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Space:
        """A space from texts, as a shell passes them.

        Args:
            texts: `name=low..high` for whole numbers if both ends are, else for real ones, with `:log` or `:step=0.1`
                behind; `name=a|b|c` for a choice, whose values are numbers, true, false, none or text.

        Returns:
            The space.

        Raises:
            ValueError: A text that is written otherwise, or a name that occurs twice.
        """
        dimensions: dict[str, Dimension] = {}
        for text in [texts] if isinstance(texts, str) else texts:
            name, equals, values = (part.strip() for part in text.partition("="))
            if not (name and equals and values):
                raise ValueError(f"{text!r} describes no values: write name=low..high, name=low..high:log or name=a|b")
            if name in dimensions:
                raise ValueError(f"{text!r}: {name} is there already, leave one out")
            try:
                dimensions[name] = _range(values) if ".." in values else Categorical(map(literal, values.split("|")))
            except ValueError as error:
                raise ValueError(f"{text!r}: {error}") from None
        return cls(dimensions)


_SUGGESTED: dict[str, Callable[..., Dimension]] = {
    "float": lambda low, high, log, step: Real(float(low), float(high), log=log, step=step),
    "int": lambda low, high, log, step: Integer(low, high, log=log, step=step),
    "categorical": lambda choices: Categorical(choices),
}


def _range(text: str) -> Dimension:
    ends, *flags = text.split(":")
    low, _, high = ends.partition("..")
    options = {key: literal(value) if mark else True for key, mark, value in (flag.partition("=") for flag in flags)}
    if set(options) - {"log", "step"} or options.get("log", True) is not True:
        raise ValueError(f"{':'.join(flags)!r} is unknown: write :log or :step=number behind the range")
    numbers = [literal(low), literal(high)]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in (*numbers, options.get("step", 1))):
        raise ValueError(f"{text!r} is no range: write two numbers, such as 1e-5..1e-3:log")
    whole = all(isinstance(x, int) for x in (*numbers, options.get("step", 1)))
    return (Integer if whole else Real)(*numbers, **options)


def literal(text: str) -> Any:
    """The value that a text stands for: true, false, none, a number, or the text itself."""
    text = text.strip()
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text

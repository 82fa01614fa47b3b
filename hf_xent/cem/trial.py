"""What `hp_space` and `model_init` are given: a trial that suggests values as optuna's do.

A space that is a function is called with trials that record what it asks for, at the ends of every range, with every
choice, and at random. A name that it asks for only in some of them would be drawn and fitted in trials that do not
use it, so such a space is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np

PROBES = 32
"""How many random trials a function is asked for its names with."""
ALWAYS = "give every name in every trial and ignore the ones that a trial does not use, or search one space at a time"


class Trial(Mapping[str, Any]):
    """The values of one candidate: a mapping of its parameters, which also suggests them by name.

    Args:
        number: Its place in the search, from 0.
        params: Name -> value.
    """

    def __init__(self, number: int, params: Mapping[str, Any]) -> None:
        self.number, self.params = number, dict(params)

    def __getitem__(self, name: str) -> Any:
        return self.params[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.params)

    def __len__(self) -> int:
        return len(self.params)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """The trial's value of a real number."""
        return cast(float, self._suggest(name, "float", low=low, high=high, log=log, step=step))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """The trial's value of a whole number."""
        return cast(int, self._suggest(name, "int", low=low, high=high, log=log, step=step))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """The trial's choice."""
        return self._suggest(name, "categorical", choices=choices)

    def _suggest(self, name: str, kind: str, **options: Any) -> Any:
        if name not in self.params:
            raise ValueError(f"hp_space asks for {name!r}, which other trials lack: {ALWAYS}")
        return self.params[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"a trial has no {name!r}: use suggest_float, suggest_int, suggest_categorical and params")


class Recording(Trial):
    """A trial that makes up its values, and remembers the dimensions that it was asked for.

    Args:
        made: Kind of a suggestion -> makes its dimension.
        place: Where in their ranges the values are, a number in [0, 1]; or what draws it for each.
    """

    def __init__(self, made: Mapping[str, Callable[..., Any]], place: float | np.random.Generator) -> None:
        super().__init__(0, {})
        self.made, self.place = made, place
        self.dimensions: dict[str, Any] = {}

    def _suggest(self, name: str, kind: str, **options: Any) -> Any:
        try:
            dimension = self.made[kind](**options)
        except ValueError as error:
            raise ValueError(f"hp_space asks for {name!r}, but {error}") from None
        if self.dimensions.setdefault(name, dimension) != dimension:
            raise ValueError(f"hp_space asks twice for {name!r}, with other values: choose another name for one")
        if name not in self.params:
            place = self.place if isinstance(self.place, float) else float(self.place.random())
            if kind == "categorical":
                count = len(dimension.choices)
                self.params[name] = dimension.choices[min(int(place * count), count - 1)]
            else:
                self.params[name] = type(dimension.low)(dimension.low + place * (dimension.high - dimension.low))
        return self.params[name]


def discovered(hp_space: Callable[[Any], Any], made: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    """The dimensions that a function of a trial asks for.

    Args:
        hp_space: The function.
        made: Kind of a suggestion ('float', 'int', 'categorical') -> makes its dimension.

    Returns:
        Name -> dimension, in the order of the calls.

    Raises:
        ValueError: A name, or the range of one, that not every trial asks for; or nothing is asked for.
    """
    rng = np.random.default_rng(0)
    first: dict[str, Any] = {}
    for probe in range(PROBES + 2):
        places = (0.0, 1.0)[probe : probe + 1]  # all at their lower ends, all at their upper ones, then at random
        recording = Recording(made, places[0] if places else rng)
        hp_space(recording)
        first = first or recording.dimensions
        for name in first.keys() ^ recording.dimensions.keys():
            raise ValueError(f"hp_space asks for {name!r} only in some trials: {ALWAYS}")
        for name, dimension in recording.dimensions.items():
            if first[name] != dimension:
                raise ValueError(f"hp_space asks for other values of {name!r} in some trials: {ALWAYS}")
    if not first:
        raise ValueError("hp_space asks for nothing: call trial.suggest_float, suggest_int or suggest_categorical")
    return first

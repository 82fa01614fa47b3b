"""A score: a function of the statistics of texts, its direction, the statistics it reads and the inputs it needs.

`stats` are [B, T] with a mask, so padding may be anywhere; a score is [B] in float64, NaN for a text without a scored
token. The function's keyword defaults are the options; parameters without a default are what the score needs beside the
statistics: an attribute of that name of `hf_xent.detection.scorer.Batch`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...ops import Stats
from ...options.ranges import is_number

VARIANCE_FLOOR = 1e-9  # nats^2


class Range(NamedTuple):
    """The values that an option may have."""

    interval: str
    """Such as '(0, 1]'."""
    hint: str
    """The same in words, to follow 'choose' in a message."""

    def check(self, option: str, value: Any) -> None:
        """Raises: ValueError for a value that is outside of the interval or not a number."""
        if not is_number(value, self.interval):
            raise ValueError(f"{option} is {value!r}: choose {self.hint}")


@dataclass(frozen=True)
class Score:
    """A registered score.

    Args:
        of: The function: (stats, inputs it needs ..., options) -> [B].
        higher_is: 'positive' if a larger score indicates the positive class (a member of the training set; text
            written by a machine), else 'negative'.
        uses: The statistics it reads beside `logp`.
        options: Values of its options that differ from the defaults.
        ranges: Option -> the values it may have.
    """

    of: Callable[..., Tensor]
    higher_is: str
    uses: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("__module__", "__name__", "__doc__"):  # help and a registry's table show those of its function
            object.__setattr__(self, name, getattr(self.of, name, None))

    @property
    def needs(self) -> tuple[str, ...]:
        """The function's inputs beside the statistics: the names of its parameters without a default."""
        parameters = list(inspect.signature(self.of).parameters.values())[1:]
        return tuple(p.name for p in parameters if p.default is p.empty)

    @property
    def defaults(self) -> dict[str, Any]:
        """The function's options and their defaults."""
        parameters = inspect.signature(self.of).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def with_options(self, **options: Any) -> Score:
        """This score with other options.

        Raises:
            ValueError: A value is outside of its range.
        """
        for option in options.keys() & self.ranges.keys():
            self.ranges[option].check(option, options[option])
        return replace(self, options=options)

    def __call__(self, stats: Stats, *needed: Any, **named: Any) -> Tensor:
        """The score of every text, [B] in float64."""
        return self.of(stats, *needed, **{**self.options, **named})

    def oriented(self, values: Any) -> np.ndarray:
        """Values of this score, negated if need be, so that larger ones indicate the positive class."""
        return np.asarray(values, dtype=np.float64) * (1 if self.higher_is == "positive" else -1)


def score(higher_is: str, uses: tuple[str, ...] = (), **ranges: Range) -> Callable[[Callable[..., Tensor]], Score]:
    """Decorator that makes a function a `Score`; `ranges` has a range by option."""
    return lambda function: Score(function, higher_is, uses, ranges=ranges)


def mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of each text, [B, T] to [B], in float64."""
    return torch.where(mask, values.double(), 0.0).sum(-1) / mask.sum(-1)

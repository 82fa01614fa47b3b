"""`Law`, the base of all laws: a frozen dataclass whose fields are the parameters of a formula for losses.

A law of this package writes `features` (what its formula needs of the columns, computed once), `of` (the formula) and
the constants below. Everything else (fits, intervals, forecasts, files) is implemented once for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from math import inf, isnan
from typing import Any, ClassVar, Self

import numpy as np
from scipy.optimize import nnls

from ..options.ranges import is_number

Features = Mapping[str, np.ndarray]
Bounds = Mapping[str, tuple[float, float]]
Starts = Mapping[str, tuple[float, ...]]
Counts = Mapping[str, int]
COEFFICIENT, EXPONENT = (0.0, inf), (0.0, 5.0)
TINY = 1e-12


class Law:
    """Base of every law. Subclasses are frozen dataclasses; their fields are parameters, and options if they have any.

    A parameter that is nan is not known yet: `hf_xent.laws.fit` finds it.
    """

    columns: ClassVar[tuple[str, ...]] = ()  # the names of what it predicts from
    bounds: ClassVar[Bounds] = {}  # parameter -> the open interval that it lies in
    starts: ClassVar[Starts] = {}  # parameter that is not linear -> values to start fits from
    linear: ClassVar[tuple[str, ...]] = ()  # the coefficients that the formula is linear in
    distinct: ClassVar[Counts] = {}  # column -> how many distinct values determine the parameters
    log_errors: ClassVar[bool] = True  # whether errors are those of logarithms (losses), or differences (scores)
    delta: ClassVar[float] = 1e-3  # where the Huber loss of these errors turns from squares to absolute values

    def __post_init__(self) -> None:
        for name in self.parameters:
            value, (low, high) = getattr(self, name), self.bounds[name]
            unknown = isinstance(value, float) and isnan(value)
            if not unknown and not is_number(value, f"[{low}, {high}]"):
                raise ValueError(f"{name} is {value!r}: choose a number in ({low:g}, {high:g}), or leave it to a fit")

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters that a fit finds, in the order of the fields."""
        return tuple(field.name for field in fields(self) if field.name in self.bounds)  # type: ignore[arg-type]

    @property
    def values(self) -> dict[str, float]:
        """Parameter -> value."""
        return {name: float(getattr(self, name)) for name in self.parameters}

    def having(self, **values: Any) -> Self:
        """A copy with other values of fields."""
        return replace(self, **values)  # type: ignore[type-var]

    def features(self, **columns: Any) -> Features:
        """What the formula needs of the columns, and what does not depend on the parameters.

        Args:
            **columns: The columns of the law: numbers, or arrays of one shape.

        Returns:
            By default the columns themselves as arrays, one value a row.

        Raises:
            ValueError: A column is missing, is none of the law's, or is not positive and finite.
        """
        named(self, columns)
        arrays = {name: np.asarray(columns[name], dtype=float) for name in self.columns}
        for name, array in arrays.items():
            if not np.all(np.isfinite(array) & (array > 0)):
                raise ValueError(f"{name} has the value {first_bad(array)!r}: a law needs positive, finite numbers")
        try:
            shaped = np.broadcast_arrays(*arrays.values())
        except ValueError:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise ValueError(f"columns have the shapes {shapes}: give arrays of one length") from None
        return dict(zip(arrays, shaped, strict=True))

    def of(self, features: Features) -> np.ndarray:
        """The formula.

        Args:
            features: What `features` returned.

        Returns:
            Losses in nats (or scores), one a row.
        """
        raise NotImplementedError

    def predict(self, **columns: Any) -> np.ndarray:
        """The loss at these columns, unchecked: `Fit.predict` refuses what the law is known to fail on.

        Args:
            **columns: The columns of the law.

        Returns:
            Losses in nats (or scores), one a row.

        Raises:
            ValueError: A column is missing or not positive, or a parameter is not known.
        """
        if unknown := [name for name, value in self.values.items() if isnan(value)]:
            raise ValueError(f"{unknown[0]} is nan: fit the law, or give it a value")
        features = self.features(**columns)
        self.check_domain(features)
        return self.of(features)

    def extent(self, **columns: Any) -> dict[str, tuple[float, float]]:
        """The least and the largest value of what the law depends on: a fit keeps them.

        Args:
            **columns: The columns of the law.

        Returns:
            By default column -> (least, largest).
        """
        return {name: (float(np.min(columns[name])), float(np.max(columns[name]))) for name in self.columns}

    def check_within(self, seen: Mapping[str, tuple[float, float]], **columns: Any) -> None:
        """Refuse columns on which a fit to others is known to fail; by default none.

        Args:
            seen: The `extent` of all that the law was fitted to.
            **columns: The columns of a forecast.

        Raises:
            ValueError: The forecast is known to fail.
        """

    def check_domain(self, features: Features) -> None:
        """Refuse rows at which the formula has no value; by default none.

        Args:
            features: What `features` returned.

        Raises:
            ValueError: A row is such a one.
        """

    def check_data(self, parts: list[Mapping[str, Any]]) -> None:
        """Refuse data that do not determine the parameters; by default by the number of distinct values of `distinct`.

        Args:
            parts: The columns of each curve, or of all rows.

        Raises:
            ValueError: The message names the column, and how much is needed.
        """
        for name, least in self.distinct.items():
            values = np.unique(np.concatenate([np.ravel(part[name]) for part in parts]))
            if len(values) < least:
                raise ValueError(
                    f"{name} has {len(values)} distinct values: {type(self).__name__} is determined by {least} or more"
                )

    def solved(self, parts: list[Features], y: np.ndarray) -> Self:
        """The law with the coefficients that fit best to the exponents it has: the starts of a fit.

        Args:
            parts: Features of each curve, or of all rows.
            y: Losses of all of them, [rows].

        Returns:
            A copy. By default its `linear` coefficients are those of non-negative least squares of relative errors.
        """
        none = self.having(**dict.fromkeys(self.linear, 0.0))
        rest = none.stacked(parts)
        design = np.stack([none.having(**{name: 1.0}).stacked(parts) - rest for name in self.linear], axis=-1)
        return self.having(**dict(zip(self.linear, coefficients(design, y, rest), strict=True)))

    def stacked(self, parts: list[Features]) -> np.ndarray:
        """The formula on the rows of all parts, [rows]."""
        return np.concatenate([np.ravel(self.of(part)) for part in parts])

    def describe(self) -> str:
        """The formula with its numbers, in one line."""
        numbers = ", ".join(f"{name}={value:.6g}" for name, value in self.values.items())
        return f"{type(self).__name__}: {numbers}"


def coefficients(design: np.ndarray, y: np.ndarray, rest: np.ndarray | float = 0.0) -> np.ndarray:
    """Positive coefficients c of `rest + design @ c = y`, by least squares of relative errors.

    Args:
        design: One column per coefficient, [rows, K].
        y: Positive losses, [rows].
        rest: What does not depend on them, [rows].

    Returns:
        [K]. One that would be zero is small instead, so that its logarithm exists.
    """
    relative = design / y[:, None]
    scale = np.maximum(np.linalg.norm(relative, axis=0), TINY)
    solution, _ = nnls(relative / scale, (y - rest) / y)
    least = 1e-3 * np.sqrt(len(y))
    return np.maximum(solution, least) / scale


def named(law: Law, columns: Mapping[str, Any], optional: tuple[str, ...] = ()) -> None:
    """Refuse columns that are not those of a law. Raises: ValueError."""
    if missing := [name for name in law.columns if name not in columns]:
        raise ValueError(f"{missing[0]} is missing: {type(law).__name__} predicts from {', '.join(law.columns)}")
    if unknown := [name for name in columns if name not in (*law.columns, *optional)]:
        raise ValueError(
            f"{unknown[0]} is not a column of {type(law).__name__}: it predicts from {', '.join(law.columns)}"
        )


def first_bad(array: np.ndarray) -> float:
    """The first value that is not positive and finite."""
    return float(array[~(np.isfinite(array) & (array > 0))].flat[0])

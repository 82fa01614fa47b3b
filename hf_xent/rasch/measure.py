"""What a fit has found: places of units, severities of levels, thresholds, their standard errors, and how they fit.

infit = sum (x - E)^2 / sum V        outfit = mean (x - E)^2 / V        both 1 on average if the model holds
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .categories import log_probabilities, mean_and_variance
from .cells import Cells
from .tables import Column, values_of


@dataclass(frozen=True)
class Facet:
    """The levels of a facet, such as the raters; arrays are [levels]."""

    names: tuple[Any, ...]
    severity: np.ndarray  # logits, their sum is 0; a harder item, a stricter rater
    se: np.ndarray  # logits
    infit: np.ndarray
    outfit: np.ndarray
    counts: np.ndarray  # numbers of scores

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary a level, for tables."""
        columns = ("severity", "se", "infit", "outfit", "counts")
        return [
            {"name": name, **{column: getattr(self, column)[i].item() for column in columns}}
            for i, name in enumerate(self.names)
        ]

    def misfits(self, low: float, high: float) -> list[Any]:
        """The names of levels whose infit is outside of [low, high]."""
        return [name for name, infit in zip(self.names, self.infit, strict=True) if not low <= infit <= high]


@dataclass(frozen=True)
class Measure:
    """An interval measure: equal differences of theta are equal differences of log-odds, whoever judged."""

    units: tuple[Any, ...]
    theta: np.ndarray  # [N], logits; infinite for a unit that method='joint' has left out
    se: np.ndarray  # [N], logits
    infit: np.ndarray  # [N], as those of facets; nan where theta is infinite
    outfit: np.ndarray
    facets: dict[str, Facet]
    """By the names of their columns, the item's first."""
    thresholds: np.ndarray  # [K - 1], sum 0; [items, K - 1] in partial credit, nan beyond an item's own
    thresholds_se: np.ndarray
    mean: float
    """Of the normal distribution of theta, as the next (0.001 if units do not differ); nan for 'joint'."""
    sd: float
    log_likelihood: float
    """Of the scores, over theta integrated in 'marginal', at theta else; in nats."""
    cells: Cells = field(repr=False)
    """The scores that were fitted."""
    rater: str | None = None
    """The column of the raters."""
    dropped: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """Column -> the units or levels that were left out: extremes, or misfits."""

    @property
    def items(self) -> Facet:
        """The items."""
        return next(iter(self.facets.values()))

    @property
    def raters(self) -> Facet:
        """The raters. Raises: ValueError if there are none."""
        if self.rater is None:
            raise ValueError("rater is None in this fit: name its column")
        return self.facets[self.rater]

    @property
    def reliability(self) -> float:
        """The share of the variance that is not error: of estimates in 'joint', of the distribution of theta else."""
        finite = np.isfinite(self.theta)
        error = float((self.se[finite] ** 2).mean())
        total = float(self.theta[finite].var()) if np.isnan(self.sd) else self.sd**2
        return 1 - error / total

    def probabilities(self, frame: Any = None) -> np.ndarray:
        """The probability of every category, in cells whose unit and levels were fitted.

        Args:
            frame: The cells, with the columns of the fit but the score's; None for those that were fitted.

        Returns:
            [O, K]; categories that an item does not have are 0.

        Raises:
            ValueError: A column is missing, or a name in it was not fitted.
        """
        place, group = self._places(frame)
        return np.exp(log_probabilities(place, sums_of(self.thresholds)[group]))

    def expected(self, frame: Any = None) -> np.ndarray:
        """The expected score [O] of cells, in the unit of the scores; arguments and errors as of `probabilities`."""
        return mean_and_variance(self.probabilities(frame))[0] + self.cells.lowest[self._places(frame)[1]]

    def _places(self, frame: Any) -> tuple[np.ndarray, np.ndarray]:
        """eta [O], and the row of the thresholds [O]."""
        name = self.cells.unit_name
        asked = {name: self.units, **{facet: found.names for facet, found in self.facets.items()}}
        values = {name: self.theta, **{facet: -found.severity for facet, found in self.facets.items()}}
        place, group = np.zeros(1), np.zeros(1, np.int64)
        for column, names in asked.items():
            if frame is None:
                own = self.cells.unit if column == name else self.cells.facets[column]
                given = [own.names[code] for code in own.codes]
            else:
                given = values_of(frame, "frame", column)
            known = {level: i for i, level in enumerate(names)}
            if new := [level for level in given if level not in known]:
                raise ValueError(
                    f"{column!r} has {new[0]!r}, which was not fitted: leave it out, or fit with its scores"
                )
            codes = np.array([known[level] for level in given], np.int64)
            place = place + values[column][codes]
            if self.cells.partial and column == next(iter(self.facets)):
                group = codes
        return place, np.broadcast_to(group, place.shape)


def sums_of(thresholds: np.ndarray) -> np.ndarray:
    """T [G, K] of thresholds [K - 1] or [G, K - 1], infinite where they are nan."""
    each = np.atleast_2d(thresholds)
    sums = np.concatenate([np.zeros((len(each), 1)), np.cumsum(each, 1)], 1)
    return np.where(np.isnan(sums), np.inf, sums)


def fit_statistics(column: Column, error: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Infit and outfit [levels] of cells [O]."""
    count = len(column.names)
    squares = np.bincount(column.codes, error**2, count)
    infit = squares / np.bincount(column.codes, variance, count)
    return infit, np.bincount(column.codes, error**2 / variance, count) / column.counts()

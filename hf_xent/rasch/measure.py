"""What a fit has found: places of units, severities of levels, thresholds, their standard errors, and how they fit.

infit = sum (x - E)^2 / sum V        outfit = mean (x - E)^2 / V        both 1 on average if the model holds
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .categories import log_probabilities, mean_and_variance
from .cells import Cells
from .tables import Column


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
    """Of the normal distribution of theta; nan for 'joint', as the next."""
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

    def probabilities(self) -> np.ndarray:
        """[O, K] of every fitted cell's categories, in the order of `cells`."""
        eta = dict(zip(self.units, self.theta, strict=True))
        place = np.array([eta[name] for name in self.cells.unit.names])[self.cells.unit.codes]
        for name, column in self.cells.facets.items():
            place = place - self.facets[name].severity[column.codes]
        return np.exp(log_probabilities(place, sums_of(self.thresholds)[self.cells.group]))

    def expected(self) -> np.ndarray:
        """[O], the expected score of every fitted cell, in the unit of the scores."""
        return mean_and_variance(self.probabilities())[0] + self.cells.lowest[self.cells.group]


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

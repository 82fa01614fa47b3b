"""The scores of a fit, each a cell of unit, item, rater and any further facet; and which parameters a cell has.

eta = theta_unit - delta_item - alpha_rater - ...       sums of every facet are 0: the last level is minus the others
T_k = tau_1 + ... + tau_k                               T_0 = T_(K-1) = 0, so the thresholds' sum is 0, too
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from .tables import Column, is_missing, values_of


@dataclass(frozen=True)
class Cells:
    """O scores; facets are by the names of their columns, the item's first."""

    unit: Column
    facets: dict[str, Column]
    raw: np.ndarray  # [O], scores as they were given
    partial: bool
    """Whether every item has thresholds, and a number of categories, of its own."""
    unit_name: str = "unit"
    """The name of the units' column."""

    def where(self, rows: np.ndarray) -> Cells:
        """Some of the cells (a mask), without units and levels that have none of them."""
        facets = {name: column.where(rows) for name, column in self.facets.items()}
        return Cells(self.unit.where(rows), facets, self.raw[rows], self.partial, self.unit_name)

    @property
    def item(self) -> Column:
        """The column of the items."""
        return next(iter(self.facets.values()))

    @cached_property
    def group(self) -> np.ndarray:
        """[O], which row of the thresholds a cell has: the item in partial credit, else 0."""
        return self.item.codes if self.partial else np.zeros(len(self.raw), np.int64)

    @cached_property
    def lowest(self) -> np.ndarray:
        """[G], the lowest score that was given."""
        found = np.full(self.group.max() + 1, np.iinfo(np.int64).max)
        np.minimum.at(found, self.group, self.raw)
        return found

    @cached_property
    def sizes(self) -> np.ndarray:
        """[G], the number K of categories."""
        found = np.full(len(self.lowest), np.iinfo(np.int64).min)
        np.maximum.at(found, self.group, self.raw)
        return found - self.lowest + 1

    @cached_property
    def score(self) -> np.ndarray:
        """[O], categories from 0."""
        return self.raw - self.lowest[self.group]

    @cached_property
    def ends(self) -> np.ndarray:
        """[O], -1 for a lowest score, 1 for a highest, else 0."""
        return np.where(self.score == 0, -1, np.where(self.score == self.sizes[self.group] - 1, 1, 0))

    @cached_property
    def contrasts(self) -> dict[str, sparse.csr_matrix]:
        """Facet -> [levels, levels - 1], severities of free parameters."""
        return {name: _contrast(len(column.names)) for name, column in self.facets.items()}

    @cached_property
    def design(self) -> sparse.csr_matrix:
        """[O, F]: what eta gains by each free parameter of the facets."""
        rows = np.arange(len(self.raw))
        parts = []
        for name, column in self.facets.items():
            shape = (len(rows), len(column.names))
            parts.append(-sparse.csr_matrix((np.ones(len(rows)), (rows, column.codes)), shape) @ self.contrasts[name])
        return sparse.hstack(parts, format="csr")

    @cached_property
    def index(self) -> np.ndarray:
        """[G, K - 2], the place of T_1 .. T_(K-2) among the free thresholds; -1 beyond a group's own."""
        own = np.arange(1, max(self.sizes.max() - 1, 1)) < (self.sizes - 1)[:, None]
        return np.where(own, np.cumsum(own).reshape(own.shape) - 1, -1)

    @property
    def counts(self) -> tuple[int, int]:
        """The numbers of free parameters: F of facets, and of thresholds."""
        return self.design.shape[1], int((self.index >= 0).sum())

    def sums(self, free: np.ndarray) -> np.ndarray:
        """T [G, K] of free thresholds, infinite beyond a group's own categories."""
        found = np.zeros((len(self.sizes), self.sizes.max()))
        found[np.arange(found.shape[1]) >= self.sizes[:, None]] = np.inf
        groups, places = np.nonzero(self.index >= 0)
        found[groups, places + 1] = free
        return found

    def severities(self, free: np.ndarray) -> dict[str, np.ndarray]:
        """Facet -> severities [levels], of free parameters [F]."""
        found, start = {}, 0
        for name, contrast in self.contrasts.items():
            width = contrast.shape[1]
            found[name] = contrast @ free[start : start + width]
            start += width
        return found

    @cached_property
    def of_units(self) -> sparse.csr_matrix:
        """[N, O], 1 where a unit has the cell: what sums rows of a matrix over the cells of each unit."""
        count = len(self.raw)
        ones = (np.ones(count), (self.unit.codes, np.arange(count)))
        return sparse.csr_matrix(ones, (len(self.unit.names), count))

    def by_unit(self, values: np.ndarray) -> np.ndarray:
        """Sums [N] over the cells of each unit."""
        return np.bincount(self.unit.codes, values, len(self.unit.names))


def read(frame: Any, columns: Mapping[str, str | None], further: tuple[str, ...], partial: bool) -> Cells:
    """The cells of a frame; those without a score are left out.

    Args:
        frame: See `values_of`.
        columns: The argument's name -> the name of its column: unit, item, rater, score; None for none.
        further: Columns of further facets.
        partial: See `Cells`.

    Raises:
        ValueError: A column is missing or named twice, a score is no whole number, or a cell has no name of a facet.
    """
    asked = [(role, name) for role, name in columns.items() if name is not None]
    asked += [("facets", name) for name in further]
    names = [name for _, name in asked]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is named twice among the columns {', '.join(names)}: name each column once")
    given = {name: values_of(frame, role, name) for role, name in asked}
    scores = given.pop(str(columns["score"]))
    kept = [not is_missing(score) for score in scores]
    if not any(kept):
        raise ValueError(f"score is {columns['score']!r}, a column without any score: choose another")
    raw = _whole([score for score, keep in zip(scores, kept, strict=True) if keep], str(columns["score"]))
    found = {}
    for name, values in given.items():
        present = [value for value, keep in zip(values, kept, strict=True) if keep]
        if any(map(is_missing, present)):
            raise ValueError(f"{name!r} has no value beside some scores: name it, or leave those rows out")
        found[name] = Column.of(present)
    unit = found.pop(str(columns["unit"]))
    return Cells(unit, found, raw, partial, str(columns["unit"]))


def _whole(scores: list[Any], name: str) -> np.ndarray:
    """Scores as whole numbers; text is read as numbers."""
    try:
        numbers = np.array([float(score) for score in scores])
    except (TypeError, ValueError) as error:
        raise ValueError(f"score is {name!r}, which has {error}: pass ordered categories as whole numbers") from None
    if (numbers % 1 != 0).any():
        odd = numbers[numbers % 1 != 0][0]
        raise ValueError(f"score is {name!r}, which has {odd}: pass ordered categories as whole numbers")
    return numbers.astype(np.int64)


def _contrast(levels: int) -> sparse.csr_matrix:
    """[levels, levels - 1]: the last level is minus the sum of the others."""
    last = sparse.csr_matrix(-np.ones((1, levels - 1)))
    return sparse.vstack([sparse.identity(levels - 1), last], format="csr") if levels > 1 else sparse.csr_matrix((1, 0))

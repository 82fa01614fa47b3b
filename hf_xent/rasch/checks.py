"""What a fit refuses: categories that were never given, levels without a finite severity, parts without a link.

Severities of two raters can be compared if a chain of units with scores of both leads from one to the other. Units that
no chain connects are components of the graph of units and levels; facets whose levels always change together are
connected, but confounded, which the rank of the design tells.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from .cells import Cells
from .tables import Column

SHOWN = 4
"""How many names a message has."""


def check_categories(cells: Cells) -> None:
    """Raises: ValueError if a group has a single category, or one between lowest and highest was never given."""
    for group, (size, lowest) in enumerate(zip(cells.sizes, cells.lowest, strict=True)):
        whose = f"item {cells.item.names[group]!r}" if cells.partial else "score"
        if size < 2:
            raise ValueError(f"{whose} has the score {lowest} alone: leave it out")
        given = np.bincount(cells.score[cells.group == group], minlength=size)
        if absent := [int(lowest + k) for k in np.flatnonzero(given == 0)]:
            raise ValueError(
                f"{whose} goes from {lowest} to {lowest + size - 1}, but {absent[0]} was never given, so its threshold"
                " has no estimate: merge categories, and number them without gaps"
            )


def extremes(cells: Cells, column: Column) -> np.ndarray:
    """[levels], -1 for a level whose scores all are the lowest, 1 if all are the highest, else 0."""
    count = column.counts()
    ends = [np.bincount(column.codes, cells.ends == end, len(count)) == count for end in (-1, 1)]
    return ends[1].astype(int) - ends[0]


def check_extremes(cells: Cells, name: str, column: Column, remedy: str) -> None:
    """Raises: ValueError if a level of a facet, or a unit, has lowest or highest scores alone."""
    ends = extremes(cells, column)
    if ends.any():
        found = [column.names[i] for i in np.flatnonzero(ends)]
        raise ValueError(
            f"{name!r} has {len(found)} whose scores all are the lowest or all the highest ({_some(found)}), which have"
            f" no finite estimate: {remedy}"
        )


def check_links(cells: Cells) -> None:
    """Raises: ValueError if severities cannot be compared; the message names the components, or the facets."""
    for name, column in cells.facets.items():
        parts = components(cells.unit, column)
        if len(parts) > 1:
            shown = "; ".join(_some(part) for part in parts[:SHOWN])
            raise ValueError(
                f"{name!r} falls into {len(parts)} groups that share no unit ({shown}), so severities of different"
                " groups cannot be compared: fit each group on its own, or add scores of the same units by both"
            )
    design = cells.design
    sums = cells.of_units @ design
    scale = sparse.diags(1 / cells.unit.counts())
    within = (design.T @ design - sums.T @ scale @ sums).toarray()
    values = np.linalg.eigvalsh(within) if within.size else np.ones(1)
    if values[0] < 1e-9 * max(values[-1], 1):
        raise ValueError(
            f"levels of {' and '.join(map(repr, cells.facets))} change together over the units, so what one gains the"
            " other loses: leave one facet out, or add scores that cross them"
        )


def components(unit: Column, level: Column) -> list[list[object]]:
    """The names of levels that chains of shared units connect, the largest group first."""
    units, levels = len(unit.names), len(level.names)
    edges = (np.ones(len(unit.codes)), (unit.codes, units + level.codes))
    graph = sparse.csr_matrix(edges, (units + levels, units + levels))
    count, part = connected_components(graph, directed=False)
    found = [[level.names[i] for i in np.flatnonzero(part[units:] == c)] for c in range(count)]
    return sorted(found, key=len, reverse=True)


def _some(names: list[object]) -> str:
    shown = ", ".join(map(str, names[:SHOWN]))
    return shown if len(names) <= SHOWN else f"{shown}, and {len(names) - SHOWN} more"

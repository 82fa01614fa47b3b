"""Many-facet Rasch models: places of units free of the severity of raters, of prompts, and of the items asked.

    log P(x = k) / P(x = k - 1) = theta_n - delta_i - alpha_r - ... - tau_k      rating: one tau; partial: each item's

theta is the unit's place, delta the item's difficulty, alpha the rater's severity, in logits; each facet's sum is 0,
and the thresholds' is. Of all units judged by all raters on all items, the raw mean orders units as theta does; where
every unit has other raters, theta corrects for them.

    measure = fit(scores, unit="text", item="criterion", rater="judge", score="score")
    measure.theta, measure.se, measure.raters.severity, measure.raters.infit

Source: Linacre 1989, Many-Facet Rasch Measurement; Kennedy et al. 2020, Constructing interval variables via faceted
Rasch measurement and multitask deep learning, arXiv:2009.10277, for measures of texts by raters of unlike severity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..options.ranges import check_count, check_flag, check_number
from . import checks
from .cells import Cells, read
from .marginal import fit_marginal
from .measure import Facet, Measure, fit_statistics
from .modal import Estimate, fit_modal, moments_at, places

CHOICES = {"model": ("rating", "partial"), "method": ("marginal", "map", "joint"), "extremes": ("refuse", "drop")}


@dataclass(frozen=True)
class Rasch:
    """The options of a fit."""

    model: str = "rating"
    """'rating': all items share categories and thresholds; 'partial': each item has its own."""
    method: str = "marginal"
    """'marginal': theta, from a normal distribution, integrated out; 'map': modes under that distribution, which is
    quicker for thousands of raters, and shrinks thresholds where units have few scores; 'joint': no distribution of
    theta, which stretches severities and thresholds there."""
    correct: bool = False
    """Of 'joint': severities and thresholds times (L - 1) / L, for L scores a unit on average. It is exact for two
    categories and one rater, as items grow easy to tell apart, and a rule of thumb else."""
    nodes: int = 21
    """Of 'marginal': the number of quadrature nodes."""
    extremes: str = "refuse"
    """What has no finite estimate, since all its scores are the lowest or all the highest: levels of a facet, and in
    'joint' units. 'drop' leaves it out and names it in `Measure.dropped`."""
    tolerance: float = 1e-6
    """A fit is done when no parameter moves by more, in logits."""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}")
        check_flag(self, "correct")
        check_count("nodes", self.nodes, 3)
        check_number(self, "tolerance", "(0, 1)")
        if self.correct and self.method != "joint":
            raise ValueError(f"correct is True, but method is {self.method!r}: only 'joint' is corrected")
        if self.nodes != 21 and self.method != "marginal":
            raise ValueError(f"nodes is {self.nodes}, but method is {self.method!r}: only 'marginal' has nodes")

    def fit(self, cells: Cells, rater: str | None = None) -> Measure:
        """The measure of cells; see the function `fit`."""
        whole = cells
        if self.extremes == "refuse":  # before those: a single category makes all levels extreme
            checks.check_categories(cells)
        cells, dropped = self._without_extremes(cells)
        checks.check_categories(cells)
        checks.check_links(cells)
        if self.method == "marginal":
            found = fit_marginal(cells, self.tolerance, self.nodes)
        else:
            found = fit_modal(cells, self.tolerance, prior=self.method == "map")
        if self.correct:
            found = _corrected(cells, found, self.tolerance)
        return _measure(cells, whole, found, rater, dropped)

    def _without_extremes(self, cells: Cells) -> tuple[Cells, dict[str, tuple[Any, ...]]]:
        """The cells of all that has a finite estimate, and what was left out by its column."""
        dropped: dict[str, tuple[Any, ...]] = {}
        asked = [*([] if self.method != "joint" else [None]), *cells.facets]
        again = True
        while again:
            again = False
            for name in asked:
                column = cells.unit if name is None else cells.facets[name]
                ends = checks.extremes(cells, column)
                if not ends.any() or (len(column.names) == 1 and name is not None):
                    continue
                key = "units" if name is None else name
                if self.extremes == "refuse":
                    checks.check_extremes(cells, key, column, _REMEDY)
                dropped[key] = (*dropped.get(key, ()), *(column.names[i] for i in np.flatnonzero(ends)))
                if not (left := (ends == 0)[column.codes]).any():
                    raise ValueError(f"nothing is left without extremes ({key}): choose other scores")
                cells, again = cells.where(left), True
        return cells, dropped


def _corrected(cells: Cells, found: Estimate, tolerance: float) -> Estimate:
    """Facets and thresholds times (L - 1) / L, and the places that are likeliest under them."""
    count = len(cells.raw) / len(cells.unit.names)
    factor = (count - 1) / count
    theta, se = places(cells, found.free * factor, tolerance)
    fitted = float(moments_at(cells, theta, found.free * factor).log_p.sum())
    return Estimate(theta, se, found.free * factor, found.covariance * factor**2, log_likelihood=fitted)


def _measure(
    cells: Cells, whole: Cells, found: Estimate, rater: str | None, dropped: dict[str, tuple[Any, ...]]
) -> Measure:
    """The measure of an estimate; units of `whole` that were not fitted are infinite, or nan without a score left."""
    at = moments_at(cells, found.theta, found.free)
    count, facets, start = cells.counts[0], {}, 0
    severities = cells.severities(found.free[:count])
    for name, column in cells.facets.items():
        contrast = cells.contrasts[name].toarray()
        part = slice(start, start + contrast.shape[1])
        se = np.sqrt(np.einsum("ij,jk,ik->i", contrast, found.covariance[part, part], contrast))
        fitting = fit_statistics(column, at.error, at.variance)
        facets[name] = Facet(column.names, severities[name], se, *fitting, column.counts())
        start = part.stop
    ends = checks.extremes(whole, whole.unit)
    per_unit = {
        "theta": np.select([ends < 0, ends > 0], [-np.inf, np.inf], np.nan),
        "se": np.full(len(ends), np.inf),
        "infit": np.full(len(ends), np.nan),
        "outfit": np.full(len(ends), np.nan),
    }
    place = {name: i for i, name in enumerate(whole.unit.names)}
    fitted = [place[name] for name in cells.unit.names]
    values = (found.theta, found.se, *fit_statistics(cells.unit, at.error, at.variance))
    for array, new in zip(per_unit.values(), values, strict=True):
        array[fitted] = new
    thresholds, se = _thresholds(cells, found)
    return Measure(
        units=whole.unit.names, **per_unit, facets=facets, thresholds=thresholds, thresholds_se=se, mean=found.mean,
        sd=found.sd, log_likelihood=found.log_likelihood, cells=cells, rater=rater, dropped=dropped,
    )  # fmt: skip


def _thresholds(cells: Cells, found: Estimate) -> tuple[np.ndarray, np.ndarray]:
    """tau and its standard errors, [K - 1] or, in partial credit, [items, K - 1] with nan beyond an item's own."""
    count = cells.counts[0]
    sums, covariance = cells.sums(found.free[count:]), found.covariance[count:, count:]
    tau, se = np.full((2, len(sums), sums.shape[1] - 1), np.nan)
    for group, size in enumerate(cells.sizes):
        tau[group, : size - 1] = np.diff(sums[group, :size])
        own = cells.index[group, : size - 2]
        steps = np.diff(np.eye(size)[:, 1 : size - 1], axis=0)  # [K - 1, K - 2], tau by T_1 .. T_(K-2)
        se[group, : size - 1] = np.sqrt(np.einsum("ij,jk,ik->i", steps, covariance[np.ix_(own, own)], steps))
    return (tau, se) if cells.partial else (tau[0], se[0])


_REMEDY = "leave them out, or choose extremes='drop', or for units method='map'"


def fit(
    frame: Any, unit: str = "unit", item: str = "item", rater: str | None = None, score: str = "score",
    facets: Sequence[str] = (), **options: Any,
) -> Measure:  # fmt: skip
    """Fit a many-facet Rasch model.

    Args:
        frame: One score a row: a mapping of columns, a data set, a DataFrame or a list of dictionaries. Rows whose
            score is missing (None, nan, 'NA') are left out, and units need not have all raters or items.
        unit: The column of what is measured, such as the text.
        item: The column of the item or criterion.
        rater: The column of the rater, if there are several.
        score: The column of the scores: whole numbers whose order counts, from any lowest one.
        facets: Columns of further facets, such as the format of a prompt.
        **options: Fields of `Rasch`: model, method, correct, nodes, extremes, tolerance.

    Returns:
        The measure, with standard errors and fit statistics.

    Raises:
        ValueError: A column or an option is not as it should be; a score is no whole number, or one between the lowest
            and the highest was never given; levels have no finite estimate; severities cannot be compared, because no
            chain of shared units connects them, or two facets always change together.
    """
    if isinstance(facets, str):
        raise ValueError(f"facets is {facets!r}: pass a list of columns")
    if unknown := [name for name in options if name not in Rasch.__dataclass_fields__]:
        raise ValueError(f"{unknown[0]} is no option of fit: choose among {', '.join(Rasch.__dataclass_fields__)}")
    settings = Rasch(**options)
    columns = {"unit": unit, "item": item, "rater": rater, "score": score}
    return settings.fit(read(frame, columns, tuple(facets), settings.model == "partial"), rater)


def drop_misfits(
    measure: Measure, facet: str | None = None, infit: tuple[float, float] = (0.5, 1.5), **options: Any
) -> Measure:
    """Leave out the levels whose infit is outside of a range, and fit again.

    It is done once: the statistics of the levels that are left are in the result, for another round if it takes one.

    Args:
        measure: A fit.
        facet: The facet's column; None for the raters.
        infit: The lowest and the highest infit that is kept.
        **options: As for `fit`; they are not taken from the first fit.

    Returns:
        The new measure, whose `dropped` names them. The same measure, if all are within the range.

    Raises:
        ValueError: There is no such facet, or fewer than two levels are left, or as `fit`.
    """
    name = measure.rater if facet is None else facet
    if name not in measure.facets:
        raise ValueError(f"facet is {name!r}: choose one of {', '.join(measure.facets)}")
    misfits = measure.facets[name].misfits(*infit)
    if not misfits:
        return measure
    column = measure.cells.facets[name]
    if len(column.names) - len(misfits) < 2:
        raise ValueError(f"infit is {infit}, within which fewer than two of {name!r} are: choose a wider range")
    out = np.array([level in misfits for level in column.names])
    again = Rasch(**options).fit(measure.cells.where(~out[column.codes]), measure.rater)
    before = {**measure.dropped, name: (*measure.dropped.get(name, ()), *misfits)}
    new = {key: (*before.get(key, ()), *names) for key, names in again.dropped.items()}
    return replace(again, dropped={**before, **new})

"""One fitter for all laws: the Huber loss of errors in logarithms, minimized from many starts.

Starts are a grid of the exponents, each with the coefficients of non-negative least squares. The best of them are
refined by a trust-region method on transformed parameters, which have no bounds: methods that move along bounds stop
early on these valleys.

Source: Hoffmann et al. 2022, arXiv:2203.15556, appendix D.3, the objective and its delta = 1e-3.
"""

from __future__ import annotations

import warnings
from copy import copy
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from ..options.ranges import check_count, is_number
from .base import TINY, Features, Law
from .curves import Curve, Data, Part, parts_of
from .fitted import Fit

REFINED = 6  # starts that are refined; the others are only evaluated
IDLE = 1e-7  # a relative effect on predictions, by a change of a parameter by its own size, that is none
AT_END = 1e-6  # the distance of an exponent from the end of its range that is none
ALIKE = 1e-5  # the singular value of the effects, each of length 1, below which they are the same
UNSURE = 3.0  # the standard error of a parameter's logarithm above which it is hardly known


def fit(
    law: str | Law | type[Law],
    data: Data,
    y: Any = None,
    *,
    delta: float | None = None,
    bootstrap: int = 0,
    seed: int = 0,
    block: int | None = None,
) -> Fit:
    """Find the parameters of a law.

    The bootstrap of columns resamples the residuals of points, smoothed, so that the sizes and tokens that were chosen
    stay. That of curves flips the signs of whole blocks of successive residuals, since neighbours err alike.

    Args:
        law: A law by name, with options as in 'annealing:decay=0.99', or as a class or object.
        data: A mapping of columns; or a curve or several.
        y: The losses of the columns; curves have theirs.
        delta: Where the Huber loss turns from squares to absolute values; by default the law's, 1e-3 for losses.
        bootstrap: The number of draws for intervals and bands; 0 for none, 200 or more for an interval of 95 %.
        seed: Of these draws.
        block: Successive points of a curve that a draw keeps together; by default the cube root of their number.

    Returns:
        The fit.

    Raises:
        ValueError: There are too few points, a value is not positive and finite, or the data do not determine a
            parameter; the message tells which.
    """
    from . import get

    law = get(law)
    parts = parts_of(law, data, y)
    if any(part.y is None for part in parts):
        raise ValueError("y is missing: give the losses of the columns")
    check_count("bootstrap", bootstrap, 0)
    if block is not None:
        check_count("block", block, 1)
    delta = law.delta if delta is None else delta
    if not is_number(delta, "(0, inf)"):
        raise ValueError(f"delta is {delta!r}: choose a number > 0")
    return _fitted(Problem(law, parts, float(delta)), _units(parts, data, block), (bootstrap, seed))


def _fitted(problem: Problem, units: np.ndarray, draws: tuple[int, int]) -> Fit:
    """The fit of a problem, with the block of each row, [rows], and the number and seed of the bootstrap's draws."""
    truth = problem.truth()
    found = problem.search(truth)
    problem.check_determined(found, truth)
    law = problem.law_at(found)
    for features in problem.features:
        law.check_domain(features)
    residuals = problem.errors(found, truth)
    blocks = int(units.max()) + 1
    kind = "points" if blocks == len(units) else "blocks of curves"
    return Fit(
        law=law,
        residuals=residuals,
        objective=problem.cost(residuals),
        delta=problem.delta,
        seen=_merged([law.extent(**part.columns) for part in problem.parts]),
        draws=problem.bootstrap(found, residuals, units, draws),
        resampled=kind if draws[0] else "nothing",
        units=blocks if draws[0] else 0,
    )


class Problem:
    """A law on its data: parameters [P] without bounds, and what they cost."""

    def __init__(self, law: Law, parts: list[Part], delta: float):
        self.law, self.parts, self.delta = law, parts, delta
        self.features: list[Features] = [law.features(**part.columns) for part in parts]
        self.names = law.parameters
        self.low, self.high = np.array([law.bounds[name] for name in self.names]).T

    def truth(self) -> np.ndarray:
        """The losses of all rows: as many as predictions, more than parameters, and enough to determine these.

        Raises: ValueError.
        """
        law = self.law
        truth = np.concatenate([np.asarray(part.y) for part in self.parts])
        rows = len(law.having(**dict.fromkeys(law.parameters, 1.0)).stacked(self.features))
        if rows != len(truth):
            raise ValueError(f"y has {len(truth)} rows and the columns {rows}: give one loss a row")
        if rows <= len(self.names):
            raise ValueError(
                f"y has {rows} points, and {type(law).__name__} has {len(self.names)} parameters: add points"
            )
        law.check_data([part.columns for part in self.parts])
        return truth

    def law_at(self, free: np.ndarray) -> Law:
        """The law with transformed parameters, which are in their bounds whatever the numbers: no check is needed."""
        grown = np.exp(np.clip(free, -300, 300))
        with np.errstate(invalid="ignore"):  # of infinity, where the other form is taken
            within = self.low + (self.high - self.low) * (grown / (1 + grown))
        values = np.where(np.isinf(self.high), self.low + grown, within)
        law = copy(self.law)
        vars(law).update(zip(self.names, values.tolist(), strict=True))
        return law

    def free_of(self, law: Law) -> np.ndarray:
        """The transformed parameters of a law, [P]."""
        above = np.array([*law.values.values()]) - self.low
        left = np.where(np.isinf(self.high), 1.0, self.high - self.low - above)
        return np.log(np.maximum(above / left, 1e-100))

    def scale(self, y: np.ndarray) -> np.ndarray:
        """Losses or scores in the space of the errors."""
        return np.log(np.maximum(y, TINY)) if self.law.log_errors else y

    def errors(self, free: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Truth - prediction in the space of the errors, [rows]."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            predicted = self.law_at(free).stacked(self.features)
        return self.scale(truth) - self.scale(np.nan_to_num(predicted, nan=1e12, posinf=1e12, neginf=TINY))

    def cost(self, errors: np.ndarray) -> float:
        """The sum of Huber losses."""
        size = np.abs(errors)
        return float(np.where(size <= self.delta, size**2 / 2, self.delta * (size - self.delta / 2)).sum())

    def refine(self, start: np.ndarray, truth: np.ndarray, loss: str = "huber", tolerance: float = 1e-12) -> np.ndarray:
        """The minimum near a start, [P]."""
        found = least_squares(
            self.errors, start, args=(truth,), loss=loss, f_scale=self.delta, xtol=tolerance, ftol=tolerance,
            gtol=1e-14, max_nfev=400,
        )  # fmt: skip
        return found.x

    def search(self, truth: np.ndarray) -> np.ndarray:
        """The best of many starts, refined, [P]."""
        names = [name for name in self.names if name in self.law.starts]
        grid = [dict(zip(names, point, strict=True)) for point in product(*(self.law.starts[n] for n in names))]
        starts = [self.free_of(self.law.having(**point).solved(self.features, truth)) for point in grid]
        starts.sort(key=lambda start: self.cost(self.errors(start, truth)))
        refined = [self.refine(self.refine(start, truth, "linear", 1e-6), truth) for start in starts[:REFINED]]
        return min(refined, key=lambda free: self.cost(self.errors(free, truth)))

    def check_determined(self, found: np.ndarray, truth: np.ndarray) -> None:
        """Refuse parameters that could change together, or alone, without changing a prediction; warn of unsure ones.

        Raises: ValueError that names them.
        """
        slopes = self._slopes(found, truth)
        size = np.linalg.norm(slopes, axis=0)
        names = np.array(self.names)
        idle = size < IDLE * np.sqrt(len(truth))
        if lost := [name for name in names[idle] if name not in self.law.linear]:
            value, ends = self.law_at(found).values[lost[0]], self.law.bounds[lost[0]]
            if at := [end for end in ends if abs(value - end) < AT_END]:
                raise ValueError(
                    f"{lost[0]} goes to {at[0]:g}, the end of its range: the data do not determine it, or they do not "
                    f"follow {type(self.law).__name__}"
                )
            raise ValueError(f"{lost[0]} has no effect at the best fit: the data do not determine it, add others")
        names, size = names[~idle], size[~idle]
        _, sizes, directions = np.linalg.svd(slopes[:, ~idle] / size, full_matrices=False)
        if sizes[-1] < ALIKE:
            together = names[np.abs(directions[-1]) > 0.2]
            raise ValueError(
                f"{', '.join(together)} change together without changing a prediction: the data do not determine them, "
                "add other sizes, tokens or schedules"
            )
        residuals = self.errors(found, truth)
        noise = np.sqrt((residuals**2).sum() / (len(truth) - len(found)))
        errors = noise / size * np.linalg.norm(directions / sizes[:, None], axis=0)
        if len(unsure := names[errors > UNSURE]):
            warnings.warn(
                f"{', '.join(unsure)} may be wrong by a factor of {np.exp(UNSURE):.0f} and more: trust forecasts near "
                "the data only, or add other sizes, tokens or schedules",
                stacklevel=4,
            )

    def _slopes(self, found: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Derivatives of the predictions by the transformed parameters, [rows, P]."""
        steps = 1e-4 * np.eye(len(found))
        return np.stack(
            [(self.errors(found - step, truth) - self.errors(found + step, truth)) / 2e-4 for step in steps], axis=-1
        )

    def bootstrap(
        self, found: np.ndarray, residuals: np.ndarray, units: np.ndarray, draws: tuple[int, int]
    ) -> np.ndarray:
        """Parameters of refits to the fitted losses with resampled residuals.

        Args:
            found: The transformed parameters, [P].
            residuals: [rows].
            units: The block of each row, [rows]; blocks of one row each are points.
            draws: How many, and their seed.

        Returns:
            [draws, P].
        """
        count, seed = draws
        rng = np.random.default_rng(seed)
        fitted = self.law_at(found).stacked(self.features)
        blocks = int(units.max()) + 1
        wide = residuals * np.sqrt(blocks / max(1, blocks - len(found)))  # a fit makes them smaller than the noise
        smooth = 1.06 * wide.std() * blocks**-0.2  # Silverman's rule: a fit passes through some points
        values = np.empty((count, len(found)))
        for draw in range(count):
            if blocks < len(residuals):
                noise = wide * rng.choice([-1.0, 1.0], blocks)[units]
            else:
                noise = rng.choice(wide, blocks) + rng.normal(0, smooth, blocks)
            truth = fitted * np.exp(noise) if self.law.log_errors else fitted + noise
            values[draw] = list(self.law_at(self.refine(found, truth, tolerance=1e-7)).values.values())
        return values


def _are_curves(data: Data) -> bool:
    return isinstance(data, Curve) or not hasattr(data, "keys")


def _units(parts: list[Part], data: Data, block: int | None) -> np.ndarray:
    """The block of each row, [rows]: of a curve, successive rows; else each row is one."""
    if not _are_curves(data):
        return np.arange(sum(len(np.asarray(part.y)) for part in parts))
    blocks: list[np.ndarray] = []
    for part in parts:
        rows = len(np.asarray(part.y))
        first = blocks[-1][-1] + 1 if blocks else 0
        blocks.append(first + np.arange(rows) // (block or max(2, round(rows ** (1 / 3)))))
    return np.concatenate(blocks)


def _merged(extents: list[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    return {
        name: (min(extent[name][0] for extent in extents), max(extent[name][1] for extent in extents))
        for name in extents[0]
    }

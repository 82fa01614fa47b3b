"""The geometry of representations: how many directions features [M, D] use, and how fast their spectrum decays.

    RankMe     exp(-sum_i p_i ln p_i),   p_i = lambda_i / sum_j lambda_j + 1e-7      of the covariance's eigenvalues
    singular   exp(-sum_i p_i ln p_i),   p_i = s_i / sum_j s_j + 1e-7                of the features' singular values
    alpha-ReQ  lambda_i ~ i^-alpha       a line through ln lambda_i against ln i, ranks 12 to 100, weights 1 / i

Both are called RankMe, and differ: the eigenvalues are squares of singular values, which are further from uniform than
what they are squares of, and of centred features. The first is what Li et al. use; the second is the original, which
does not centre. A RankMe is in [1, min(M, D)], up to the terms of 1e-7; it does not change if features are rotated or
scaled. It grows with the number of documents, so compare it at equal numbers alone, best of the same documents.

A wide spectrum is not a better model: these numbers describe, and no phase of training can be told from one of them.

Source: Li et al. 2025, arXiv:2509.23024; the original RankMe is that of Garrido et al. 2023, the weighted fit that of
Stringer et al. 2019. Here is no limit of 2048 eigenvalues, as their code has.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..options.ranges import check_count
from .moments import Moments, checked_rows
from .resampling import bootstrap_sd

FIRST, LAST = 12, 100
"""The ranks of alpha-ReQ's window, both included."""
NOISE = 1e-7
"""What both papers add to each share."""
LEAST_RANKS = 10
"""Fewer ranks than this give no line worth its name; this number is the project's choice."""
MEASURES = ("rankme", "singular_rankme", "alpha", "alpha_r2")
SPREAD = "{}_sd"
"""The name of a measure's standard deviation."""


class PowerDecay(NamedTuple):
    """The line through a spectrum: lambda_i ~ i^-alpha, and R^2, the weighted share of ln lambda that it explains."""

    alpha: float
    r2: float


def spectrum(features: ArrayLike | Moments, *, centred: bool = True) -> np.ndarray:
    """The eigenvalues of the covariance of features, or the squares of their singular values.

    Args:
        features: Features [M, D], one row for each document, or their `Moments`.
        centred: Whether the mean is taken off. If it is not, the result are the squares of the singular values.

    Returns:
        min(M, D) eigenvalues in descending order, float64, none below 0.

    Raises:
        ValueError: Fewer than 2 rows, numbers that are not finite, or features that are no matrix.
    """
    if isinstance(features, Moments):
        count, matrix = features.count, features.scatter if centred else features.products()
    else:
        rows = checked_rows(features)
        count = len(rows)
        if centred and count:
            rows = rows - rows.mean(0)
        # the smaller of both products; they have the same eigenvalues but for zeros
        matrix = rows @ rows.T if count < rows.shape[1] else rows.T @ rows
    if count < 2:
        raise ValueError(f"features have {count} rows: a spectrum needs at least 2 documents")
    values = np.linalg.eigvalsh(matrix)[::-1][: min(count, len(matrix))].clip(min=0.0)
    return values / (count - 1) if centred else values


def rankme(eigenvalues: ArrayLike) -> float:
    """RankMe of the covariance's eigenvalues, exp of the entropy of their shares: the module's first formula.

    Args:
        eigenvalues: As `spectrum` returns them.

    Returns:
        The effective number of directions, from 1.

    Raises:
        ValueError: No eigenvalue is above 0, or one is below 0 or not finite.
    """
    return _effective_rank(_spectrum_of(eigenvalues))


def singular_rankme(eigenvalues: ArrayLike) -> float:
    """The original RankMe, of singular values: the module's second formula.

    Args:
        eigenvalues: Squares of singular values, as `spectrum` returns them with `centred=False`.

    Returns:
        The effective number of directions, from 1.

    Raises:
        ValueError: As for `rankme`.
    """
    return _effective_rank(np.sqrt(_spectrum_of(eigenvalues)))


def alpha_req(eigenvalues: ArrayLike, first: int = FIRST, last: int = LAST) -> PowerDecay:
    """alpha-ReQ: the exponent of a spectrum's decay by weighted least squares on logarithms.

        minimize sum_i (1 / i) (c - alpha ln i - ln lambda_i)^2        over the ranks first <= i <= last

    Args:
        eigenvalues: Eigenvalues of a covariance in descending order, as `spectrum` returns them.
        first: The first rank of the window, counted from 1.
        last: The last one. A spectrum that has fewer ranks above rounding errors ends the window there.

    Returns:
        alpha, larger for a faster decay, and the weighted R^2.

    Raises:
        ValueError: The window has fewer than 10 ranks; eigenvalues as for `rankme`.
    """
    check_count("first", first, 1)
    values = _spectrum_of(eigenvalues)
    end = min(last, usable_ranks(values))
    if end - first + 1 < LEAST_RANKS:
        raise ValueError(
            f"last is {last} and the spectrum has {usable_ranks(values)} ranks above rounding errors, so {first} to"
            f" {end} are fewer than {LEAST_RANKS}: use wider features or more documents"
        )
    ranks = np.arange(first, end + 1)  # a new array at every call: the window of the next call is the same
    x, y, weights = np.log(ranks), np.log(values[first - 1 : end]), 1.0 / ranks
    x = x - np.average(x, weights=weights)
    y = y - np.average(y, weights=weights)
    slope = np.average(x * y, weights=weights) / np.average(x * x, weights=weights)
    total = np.average(y * y, weights=weights)
    left = np.average((y - slope * x) ** 2, weights=weights)
    return PowerDecay(float(-slope), float(1 - left / total) if total else float("nan"))


def usable_ranks(eigenvalues: ArrayLike) -> int:
    """The number of eigenvalues that are more than the rounding errors of the largest one."""
    values = np.asarray(eigenvalues, dtype=np.float64)
    return int((values > len(values) * np.finfo(np.float64).eps * values.max(initial=0.0)).sum())


def measures(features: ArrayLike | Moments) -> dict[str, float]:
    """All measures of features.

    Args:
        features: Features [M, D], or their `Moments`.

    Returns:
        `rankme`, `singular_rankme`, and `alpha` with `alpha_r2`, which are nan if too few ranks are above rounding
        errors, as after a collapse.

    Raises:
        ValueError: As for `spectrum` and `rankme`.
    """
    centred = spectrum(features)
    fits = usable_ranks(centred) - FIRST + 1 >= LEAST_RANKS
    decay = alpha_req(centred) if fits else PowerDecay(float("nan"), float("nan"))
    original = singular_rankme(spectrum(features, centred=False))
    return dict(zip(MEASURES, (rankme(centred), original, decay.alpha, decay.r2), strict=True))


def warn_if_few(documents: int, width: int) -> None:
    """Warn of what limits the measures: features narrower than alpha-ReQ's window, or few documents for their width.

    Args:
        documents: The number of rows, M.
        width: The number of features, D.

    Raises:
        ValueError: The window has fewer than 10 ranks whatever the features are.
    """
    ranks = min(documents - 1, width)
    if ranks - FIRST + 1 < LEAST_RANKS:
        raise ValueError(
            f"features are {documents} rows of {width}, so {ranks} ranks: alpha-ReQ's window begins at {FIRST} and"
            f" needs {LEAST_RANKS}, take a wider model or more documents"
        )
    if width < LAST:
        warnings.warn(f"features have {width} columns: alpha-ReQ's window ends there, not at {LAST}", stacklevel=2)
    if documents < 2 * width:
        warnings.warn(
            f"documents number {documents}, less than twice the width {width}: the spectrum's tail is that of the"
            " sample, compare at equal numbers of documents alone",
            stacklevel=2,
        )


def by_layer(
    batches: Iterable[Mapping[int, ArrayLike]], *, resamples: int = 0, seed: int = 0
) -> dict[int, dict[str, float]]:
    """The measures of every layer, read batch by batch.

    Args:
        batches: Layer -> features [M, D] of the documents of a batch.
        resamples: Resamples of the documents for the standard deviations; 0 for none, and then no features are kept.
        seed: Seed of the resampling.

    Returns:
        Layer -> its `documents`, its `measures`, and with resamples NAME_sd of each; for a 95 % interval take 1.96 of
        it on both sides (`hf_xent.metrics.resampling` says why).

    Raises:
        ValueError: As for `measures`.
    """
    kept: dict[int, list[np.ndarray]] = {}
    moments: dict[int, Moments] = {}
    for batch in batches:
        for layer, features in batch.items():
            if resamples:
                kept.setdefault(layer, []).append(checked_rows(features))
            else:
                moments.setdefault(layer, Moments()).add(features)
    found = {layer: {"documents": sums.count, **measures(sums)} for layer, sums in moments.items()}
    for layer, parts in kept.items():
        rows = np.concatenate(parts)
        spread = bootstrap_sd(_numbers, rows, resamples=resamples, seed=seed)
        errors = {SPREAD.format(name): float(sd) for name, sd in zip(MEASURES, spread, strict=True)}
        found[layer] = {"documents": len(rows), **measures(rows), **errors}
    return found


def _numbers(rows: np.ndarray) -> np.ndarray:
    """The measures in their order [4]."""
    return np.array(list(measures(rows).values()))


def _effective_rank(values: np.ndarray) -> float:
    shares = values / values.sum() + NOISE
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _spectrum_of(eigenvalues: ArrayLike) -> np.ndarray:
    values = np.asarray(eigenvalues, dtype=np.float64)
    if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise ValueError(
            f"eigenvalues have the shape {values.shape} and the sum {values.sum():.3g}: pass a vector of finite numbers"
            " from 0 that are not all 0; features that are the same for all documents have none"
        )
    return values

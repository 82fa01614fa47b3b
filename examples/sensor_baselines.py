"""For sensor_digits.py: densities of the next step that are normal or Student-t, with a full covariance."""

from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.stats import multivariate_normal, multivariate_t

DEGREES = (2.5, 3, 4, 5, 7, 10, 15, 30, 100)


def fitted_t(errors: np.ndarray, steps: int = 50) -> tuple[np.ndarray, float]:
    """The scale and the degrees of freedom of most likelihood, of a Student-t distribution around 0."""
    found, d = [], errors.shape[1]
    for degrees in DEGREES:
        scale = np.cov(errors.T)
        for _ in range(steps):  # expectation-maximisation: errors far out weigh less
            weight = (degrees + d) / (degrees + np.einsum("nd,nd->n", errors @ np.linalg.inv(scale), errors))
            scale = (weight[:, None] * errors).T @ errors / len(errors)
        found.append((multivariate_t(np.zeros(d), scale, degrees).logpdf(errors).mean(), degrees, scale))
    _, degrees, scale = max(found, key=lambda one: one[0])
    return scale, degrees


def errors_of(mean: str, train: np.ndarray, rows: np.ndarray, before: int) -> np.ndarray:
    """What is left of rows from the `before`-th on, by a model of their mean that was fitted to other rows."""
    if mean == "constant":
        return rows[before:] - train[before:].mean(0)
    if mean == "walk":
        return rows[before:] - rows[before - 1 : -1]

    def past(x: np.ndarray) -> np.ndarray:
        lags = [x[before - lag : len(x) - lag] for lag in range(1, before + 1)]
        return np.concatenate([*lags, np.ones((len(x) - before, 1))], 1)

    a = past(train)
    weight = np.linalg.solve(a.T @ a + np.eye(a.shape[1]), a.T @ train[before:])
    return rows[before:] - past(rows) @ weight


def density(mean: str, errors: str, train: np.ndarray, test: np.ndarray, before: int) -> float:
    """-log p of test rows from the `before`-th on, nats a dimension."""
    seen, left = errors_of(mean, train, train, before), errors_of(mean, train, test, before)
    if errors == "normal":
        logp = multivariate_normal(np.zeros(seen.shape[1]), seen.T @ seen / len(seen)).logpdf(left)
    else:
        scale, degrees = fitted_t(seen)
        logp = multivariate_t(np.zeros(seen.shape[1]), scale, degrees).logpdf(left)
    return float(-logp.mean() / seen.shape[1])


CONTROLS: dict[str, Callable[..., float]] = {
    f"{mean}, {errors}": partial(density, mean, errors)
    for mean in ("constant", "walk", "24 lags") for errors in ("normal", "Student-t")
}  # fmt: skip

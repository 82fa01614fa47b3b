"""Mean and covariance of rows that arrive in batches, none of which is kept.

    n = n_a + n_b,   d = mean_b - mean_a
    mean = mean_a + d n_b / n,   scatter = scatter_a + scatter_b + d d^T n_a n_b / n

The scatter, the sum of (x - mean)(x - mean)^T, is updated instead of the sum of x x^T: the difference of two large sums
loses the small eigenvalues. All is float64, so D = 2048 takes 32 MB.

Source: Chan, Golub & LeVeque 1983, Algorithms for Computing the Sample Variance, The American Statistician 37(3).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


class Moments:
    """The moments of all rows that `add` was given.

    `count` is their number, `mean` [D] their mean, and `scatter` [D, D] the sum of (x - mean)(x - mean)^T.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = np.zeros(0)
        self.scatter = np.zeros((0, 0))

    def add(self, rows: ArrayLike) -> Moments:
        """Include more rows.

        Args:
            rows: Features [M, D]; M may differ from call to call and be 0.

        Returns:
            These moments.

        Raises:
            ValueError: Rows that are not a matrix of finite numbers, or of another width than the rows before.
        """
        batch = checked_rows(rows)
        if self.count and batch.shape[1] != len(self.mean):
            raise ValueError(f"rows have {batch.shape[1]} columns, the rows before {len(self.mean)}: pass one kind")
        if not len(batch):
            return self
        mean = batch.mean(0)
        centred = batch - mean
        scatter = centred.T @ centred
        if not self.count:
            self.count, self.mean, self.scatter = len(batch), mean, scatter
            return self
        total, step = self.count + len(batch), mean - self.mean
        self.scatter = self.scatter + scatter + np.outer(step, step) * (self.count * len(batch) / total)
        self.mean = self.mean + step * (len(batch) / total)
        self.count = total
        return self

    def covariance(self) -> np.ndarray:
        """The covariance [D, D], with the divisor count - 1. Raises: ValueError for fewer than 2 rows."""
        if self.count < 2:
            raise ValueError(f"rows number {self.count}: a covariance needs at least 2")
        return self.scatter / (self.count - 1)

    def products(self) -> np.ndarray:
        """The sum of x x^T over all rows [D, D], not centred: its eigenvalues are squared singular values."""
        return self.scatter + self.count * np.outer(self.mean, self.mean)


def checked_rows(rows: ArrayLike) -> np.ndarray:
    """Rows as a float64 matrix [M, D]. Raises: ValueError if they are no matrix of finite numbers."""
    matrix = np.asarray(rows, dtype=np.float64)
    if matrix.ndim != 2 or not matrix.shape[1]:
        raise ValueError(f"features have the shape {matrix.shape}: pass a matrix, one row for each document")
    if bad := int((~np.isfinite(matrix)).any(1).sum()):
        raise ValueError(f"features have {bad} rows with numbers that are not finite: leave those documents out")
    return matrix

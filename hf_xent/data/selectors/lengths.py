"""What a score has beyond its dependence on length: the residual of a local regression on the logarithm of the length.

    r_i = s_i - f(log l_i)          f(g): the line through the nearest half of the texts, fitted by least squares with
                                    weights (1 - (|log l - g| / h)^3)^3, h the distance of the farthest of them

Source: Cleveland 1979, Robust Locally Weighted Regression and Smoothing Scatterplots, JASA 74, without its robustness
steps.
"""

from __future__ import annotations

import numpy as np

SPAN = 0.5
"""The share of the texts that a line is fitted to."""
GRID = 200
"""Lines are fitted at this many quantiles of the lengths at most, and interpolated between them."""
LEAST = 20
"""Fewer texts than this are too few: lines would run through the scores themselves."""


def residual(scores: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Scores minus what a local regression on the logarithm of the length expects.

    Args:
        scores: One score for every text [N].
        lengths: Their lengths [N]; 0 counts as 1.

    Returns:
        Float64 [N].

    Raises:
        ValueError: There are fewer than 20 texts.
    """
    if len(scores) < LEAST:
        raise ValueError(
            f"normalise is 'length', but there are {len(scores)} texts, too few for a regression on length: pass"
            f" normalise=None, or at least {LEAST} texts"
        )
    x = np.log(np.maximum(lengths, 1).astype(np.float64))
    grid = np.unique(x)
    if len(grid) > GRID:
        grid = np.unique(np.quantile(x, np.linspace(0, 1, GRID)))
    fitted = np.array([_line(x, scores, point) for point in grid])
    return scores - np.interp(x, grid, fitted)


def _line(x: np.ndarray, scores: np.ndarray, point: float) -> float:
    """The value at a point of the line through the texts around it."""
    distance = np.abs(x - point)
    nearest = int(np.ceil(SPAN * len(x)))
    width = np.partition(distance, nearest - 1)[nearest - 1]
    if width == 0:  # half of the texts have this length
        return float(scores[distance == 0].mean())
    weights = (1 - np.minimum(distance / width, 1) ** 3) ** 3
    weights /= weights.sum()
    center, level = weights @ x, weights @ scores
    spread = weights @ (x - center) ** 2
    # all that has weight may have one length; the smallest spread that is none is far above rounding
    slope = weights @ ((x - center) * scores) / spread if spread > 1e-18 else 0.0
    return float(level + slope * (point - center))

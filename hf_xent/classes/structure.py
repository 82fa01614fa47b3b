"""Structural similarity of images (SSIM), a term of the loss `hybrid`: means, contrasts and structure of patches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

C1, C2 = 0.01**2, 0.03**2
"""What keeps the ratios finite, for values in [0, 1]."""


def ssim(
    first: Tensor, second: Tensor, window: int = 11, sigma: float = 1.5, padding: str = "zero",
    counted: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The structural similarity of images with values in [0, 1]: 1 for equal ones.

        (2 mu nu + C1) (2 cov + C2) / ((mu^2 + nu^2 + C1) (var + var' + C2)),  C1 = .01^2, C2 = .03^2

    Args:
        first: Images [B, C, H, W].
        second: The images they are compared with, [B, C, H, W].
        window: The number of pixels of a side of the Gaussian window, odd.
        sigma: Its standard deviation in pixels.
        padding: 'zero', or 'valid' for windows inside of the image alone.
        counted: The pixels [B, 1 or C, H, W] whose windows are in the mean; all by default.

    Returns:
        The mean over windows, [B, C]; 1 where none counts.

    Raises:
        ValueError: An image is smaller than a window, and padding is 'valid'.
    """
    height, width = first.shape[-2:]
    edge = window // 2 if padding == "valid" else 0
    if edge and min(height, width) < window:
        raise ValueError(f"window is {window} for images of {height} x {width} pixels: choose a smaller one, or 'zero'")
    maps = torch.stack([first, second, first * first, second * second, first * second])
    rows, columns = (_window(side, window, sigma, edge).to(first) for side in (height, width))
    with torch.autocast(first.device.type, enabled=False):  # variances are differences of means
        maps = rows @ maps @ columns.T  # faster than convolutions, whose gradients are slow for one channel
    mu, nu, xx, yy, xy = maps
    top = (2 * mu * nu + C1) * (2 * (xy - mu * nu) + C2)
    values = top / ((mu * mu + nu * nu + C1) * (xx - mu * mu + yy - nu * nu + C2))
    if counted is None:
        return values.mean((-2, -1))
    inside = counted[..., edge : height - edge, edge : width - edge].expand_as(values)
    count = inside.sum((-2, -1))
    return torch.where(count > 0, (values * inside).sum((-2, -1)) / count.clamp(min=1), 1)


def _window(side: int, window: int, sigma: float, edge: int) -> Tensor:
    """The matrix [side - 2 edge, side] that averages a line of pixels with Gaussian weights, zeros beyond its ends."""
    distances = torch.arange(side) - torch.arange(edge, side - edge)[:, None]
    line = torch.exp(-((torch.arange(window, dtype=torch.float64) - window // 2) ** 2) / (2 * sigma**2))
    weights = torch.exp(-(distances.double() ** 2) / (2 * sigma**2)) / line.sum()
    return weights.masked_fill(distances.abs() > window // 2, 0)


def similarity(p: np.ndarray, y: np.ndarray, counted: np.ndarray, window: int, sigma: float, padding: str) -> float:
    """For references: SSIM of two images [H, W] in numpy, with centred moments of windows that are cut out."""
    r, (height, width) = window // 2, p.shape
    edge = r if padding == "valid" else 0
    inside = slice(edge, height - edge), slice(edge, width - edge)
    squares = (np.arange(window) - r) ** 2
    weights = np.exp(-(squares[:, None] + squares).ravel() / (2 * sigma**2))
    weights /= weights.sum()
    cut = (np.lib.stride_tricks.sliding_window_view(np.pad(x, r), (window, window))[inside] for x in (p, y))
    a, b = (x.reshape(*x.shape[:2], -1) for x in cut)
    mu, nu = a @ weights, b @ weights
    a, b = a - mu[..., None], b - nu[..., None]
    variances, covariance = (a * a + b * b) @ weights, (a * b) @ weights
    values = (2 * mu * nu + C1) * (2 * covariance + C2) / ((mu**2 + nu**2 + C1) * (variances + C2))
    return float(values[counted[inside]].mean()) if counted[inside].any() else 1.0

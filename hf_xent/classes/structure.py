"""Structural similarity of images (SSIM), a term of the loss `hybrid`: means, contrasts and structure of patches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

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
    batch, channels, height, width = first.shape
    r = window // 2
    edge = r if padding == "valid" else 0
    if edge and min(height, width) < window:
        raise ValueError(f"window is {window} for images of {height} x {width} pixels: choose a smaller one, or 'zero'")
    line = torch.exp(-((torch.arange(window, device=first.device, dtype=first.dtype) - r) ** 2) / (2 * sigma**2))
    line = line / line.sum()
    maps = torch.stack([first, second, first * first, second * second, first * second]).flatten(0, 2)[:, None]
    with torch.autocast(first.device.type, enabled=False):  # variances are differences of means
        maps = F.conv2d(maps, line[None, None, :, None], padding=(r - edge, 0))
        maps = F.conv2d(maps, line[None, None, None], padding=(0, r - edge))
    mu, nu, xx, yy, xy = maps.view(5, batch, channels, *maps.shape[-2:])
    top = (2 * mu * nu + C1) * (2 * (xy - mu * nu) + C2)
    values = top / ((mu * mu + nu * nu + C1) * (xx - mu * mu + yy - nu * nu + C2))
    if counted is None:
        return values.mean((-2, -1))
    inside = counted[..., edge : height - edge, edge : width - edge].expand_as(values)
    count = inside.sum((-2, -1))
    return torch.where(count > 0, (values * inside).sum((-2, -1)) / count.clamp(min=1), 1)


def similarity(p: np.ndarray, y: np.ndarray, counted: np.ndarray, window: int, sigma: float, padding: str) -> float:
    """For references: SSIM of two images [H, W] in numpy, with centred moments of windows that are cut out."""
    r, (height, width) = window // 2, p.shape
    edge = r if padding == "valid" else 0
    inside = slice(edge, height - edge), slice(edge, width - edge)
    squares = (np.arange(window) - r) ** 2
    weights = np.exp(-(squares[:, None] + squares) / (2 * sigma**2))
    weights /= weights.sum()
    a, b = (np.lib.stride_tricks.sliding_window_view(np.pad(x, r), weights.shape)[inside] for x in (p, y))
    mu, nu = ((weights * x).sum((2, 3)) for x in (a, b))
    a, b = a - mu[..., None, None], b - nu[..., None, None]
    variances, covariance = (weights * (a * a + b * b)).sum((2, 3)), (weights * a * b).sum((2, 3))
    values = (2 * mu * nu + C1) * (2 * covariance + C2) / ((mu**2 + nu**2 + C1) * (variances + C2))
    return float(values[counted[inside]].mean()) if counted[inside].any() else 1.0

"""Corruptions of images, such as a sensor, a bad lens or an odd place makes, in severities from 0 (none) to 5.

    worse = corrupt(images, "fog", severity=3, seed=0)             # [N, C, H, W], from 0 to 1
    mixed = corrupt(images, "blur", severity=torch.linspace(0, 5, len(images)))

A severity may be a fraction, and another one for each image; each corruption is a function of images, severities
[N, 1, 1, 1] from 0 to 1, and a generator. One of torch on the CPU draws everything, in an order that does not depend on
severities, so that a seed repeats a corruption and a larger severity is more of the same. The kinds are those of common
benchmarks; the formulas and their strengths are choices of this library, for images of about 28 x 28 pixels and up.

Source: after Hendrycks and Dietterich 2019, Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations, arXiv:1903.12261, whose images these are not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ..options.ranges import check_count, is_number

WORST = 5
"""The largest severity."""


def gaussian_noise(x: Tensor, s: Tensor, generator: Generator) -> Tensor:
    """Noise of a standard deviation of up to 0.5."""
    return x + 0.5 * s * _randn(x.shape, generator, x)


def shot_noise(x: Tensor, s: Tensor, generator: Generator) -> Tensor:
    """Noise whose variance grows with brightness, as that of counted light does: its normal approximation."""
    return x + 0.9 * s * (x.clamp(min=0) + 0.02 * s).sqrt() * _randn(x.shape, generator, x)


def impulse_noise(x: Tensor, s: Tensor, generator: Generator) -> Tensor:
    """Up to 30 % of the pixels are black or white."""
    draws = torch.rand(x.shape, generator=generator).to(x)
    return torch.where(draws < 0.15 * s, 0.0, torch.where(draws > 1 - 0.15 * s, 1.0, x))


def blur(x: Tensor, s: Tensor, generator: Generator) -> Tensor:
    """A mean over neighbours, again and again: up to 8 times over 3 x 3 pixels."""
    for time in range(8):
        share = (8 * s - time).clamp(0, 1)
        x = x.lerp(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1), share)
    return x


def pixelate(x: Tensor, s: Tensor, generator: Generator) -> Tensor:
    """Blocks of one colour, a seventh of a side long, mixed with the image below severity 5."""
    side = max(1, x.shape[-1] // 7)
    small = F.adaptive_avg_pool2d(x, (max(1, x.shape[-2] // side), max(1, x.shape[-1] // side)))
    return x.lerp(F.interpolate(small, x.shape[-2:], mode="nearest"), s)


def contrast(x: Tensor, s: Tensor, generator: Generator) -> Tensor:
    """As little as 10 % of the contrast, around the mean of the image."""
    return x.lerp(x.mean((1, 2, 3), keepdim=True), 0.9 * s)


def brightness(x: Tensor, s: Tensor, generator: Generator) -> Tensor:
    """Up to 0.4 brighter, cut at white."""
    return x + 0.4 * s


def thickening(x: Tensor, s: Tensor, generator: Generator) -> Tensor:
    """What is bright grows: the largest of the neighbours, up to twice over 3 x 3 pixels."""
    for time in range(2):
        share = (2 * s - time).clamp(0, 1)
        x = x.lerp(F.max_pool2d(x, 3, 1, 1), share)
    return x


def stripes(x: Tensor, s: Tensor, generator: Generator) -> Tensor:
    """Straight waves of grey over the image, in a random direction, with an eighth of a side between them."""
    draws = torch.rand(len(x), 2, 1, 1, 1, generator=generator).to(x)
    angle, start = torch.pi * draws[:, 0], 2 * torch.pi * draws[:, 1]
    rows, columns = (torch.linspace(0, 1, size).to(x) for size in x.shape[-2:])
    place = angle.sin() * rows[:, None] + angle.cos() * columns
    return x + 0.6 * s * (16 * torch.pi * place + start).sin().clamp(min=0)


def fog(x: Tensor, s: Tensor, generator: Generator) -> Tensor:
    """A smooth random cloud of up to 75 % over the image."""
    return x.lerp(_clouds(x, generator), 0.75 * s)


def rotation(x: Tensor, s: Tensor, generator: Generator) -> Tensor:
    """Turned by up to 45 degrees, either way."""
    sign = torch.rand(len(x), generator=generator).to(x).sub(0.5).sign()
    angle = sign * s.flatten() * torch.pi / 4
    rows = [torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)]
    return _placed(x, torch.cat([torch.stack(rows, 1), torch.zeros(len(x), 2, 1).to(x)], -1))


def shift(x: Tensor, s: Tensor, generator: Generator) -> Tensor:
    """Moved by up to a sixth of the sides in a random direction; what comes in is as the edge was."""
    angle = 2 * torch.pi * torch.rand(len(x), generator=generator).to(x)
    move = torch.stack([angle.cos(), angle.sin()], -1) / 3 * s.flatten()[:, None]
    return _placed(x, torch.cat([torch.eye(2).to(x).expand(len(x), 2, 2), move[..., None]], -1))


def elastic(x: Tensor, s: Tensor, generator: Generator) -> Tensor:
    """Bent: each pixel comes from up to a sixth of a side away, neighbours from neighbouring places."""
    moves = [_clouds(x[:, :1], generator, detail=4).squeeze(1) - 0.5 for _ in range(2)]
    still = F.affine_grid(torch.eye(2, 3).to(x).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    grid = still + torch.stack(moves, -1) * 0.66 * s
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def occlusion(x: Tensor, s: Tensor, generator: Generator) -> Tensor:
    """A square patch of random texture of up to half of the sides, at a random place."""
    height, width = x.shape[-2:]
    places = torch.rand(len(x), 2, generator=generator).to(x)
    texture = torch.rand(x.shape, generator=generator).to(x)
    inside = torch.ones_like(x[:, :1])
    for size, dim in ((height, 0), (width, 1)):
        steps = torch.arange(size).to(x).view((1, 1, -1, 1) if dim == 0 else (1, 1, 1, -1))
        side = 0.5 * s * size
        start = places[:, dim].view(-1, 1, 1, 1) * (size - side)
        inside = inside * (steps >= start) * (steps < start + side)
    return torch.where(inside.bool(), texture, x)


CORRUPTIONS: dict[str, Callable[[Tensor, Tensor, Generator], Tensor]] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "blur": blur,
    "pixelate": pixelate,
    "contrast": contrast,
    "brightness": brightness,
    "thickening": thickening,
    "stripes": stripes,
    "fog": fog,
    "rotation": rotation,
    "shift": shift,
    "elastic": elastic,
    "occlusion": occlusion,
}
"""Name -> corruption of images, severities from 0 to 1, and a generator."""


def corrupt(images: Tensor, name: str, severity: float | Tensor = WORST, seed: int = 0) -> Tensor:
    """Images under a corruption, cut to 0 to 1.

    Args:
        images: [N, C, H, W], from 0 to 1, in float32 or wider.
        name: A name of `CORRUPTIONS`.
        severity: From 0, which leaves images as they are, to 5; a number, or one for each image, [N].
        seed: Of what is drawn.

    Returns:
        [N, C, H, W], a new tensor.

    Raises:
        ValueError: Images are no numbers from 0 to 1, or the name or a severity is unknown.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"name is {name!r}: choose one of {', '.join(CORRUPTIONS)}")
    check_count("seed", seed, 0)
    if images.ndim != 4 or not images.is_floating_point() or images.itemsize < 4:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}: give float32 [N, C, H, W], from 0 to 1")
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"images are from {images.min():.4g} to {images.max():.4g}: scale them to 0 to 1")
    levels = torch.as_tensor(severity, dtype=images.dtype, device=images.device).expand(len(images))
    if not all(is_number(level, f"[0, {WORST}]") for level in levels.tolist()):
        raise ValueError(f"severity is {severity!r}: choose numbers from 0 to {WORST}")
    share = (levels / WORST).view(-1, 1, 1, 1)
    made = CORRUPTIONS[name](images, share, torch.Generator().manual_seed(seed)).clamp(0, 1)
    return torch.where(share > 0, made, images)  # resampling an image at its own places rounds


def _randn(shape: torch.Size, generator: Generator, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=generator).to(like)


def _clouds(x: Tensor, generator: Generator, detail: int = 5) -> Tensor:
    """A smooth random image for each image, from 0 to 1, of one channel: a sum of a few sizes."""
    total = torch.zeros_like(x[:, :1])
    for cells in range(2, detail + 1):
        coarse = torch.rand(len(x), 1, cells, cells, generator=generator).to(x)
        total += F.interpolate(coarse, x.shape[-2:], mode="bicubic", align_corners=True).clamp(0, 1) / cells
    return total / sum(1 / cells for cells in range(2, detail + 1))


def _placed(x: Tensor, places: Tensor) -> Tensor:
    """Images seen through affine maps [N, 2, 3] of their coordinates, with their edges repeated beyond."""
    grid = F.affine_grid(places, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

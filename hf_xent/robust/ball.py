"""The changes of an input that an attack may choose from: a ball around it, cut by the range of inputs.

    |(x' - x) / unit|_p <= radius,  low <= x' <= high,  x' = x where `mask` is False

`unit` is the length that a radius of 1 has in the input: 1 / std for an image that a processor has normalised, if the
radius is of pixels from 0 to 1. For p = 2 the norm is over all that belongs to one vector: an image, or a token.

Source: Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv:1706.06083.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..options.ranges import check_number

NORMS = ("inf", "2")
TINY = 1e-12


@dataclass(frozen=True)
class Ball:
    """A ball around each row of an input; see the module's docstring.

    Raises:
        ValueError: The radius is not above 0, or the norm is unknown.
    """

    radius: float
    """How far an input may be moved, in units."""
    norm: str = "inf"
    """'inf', the largest change of a number, or '2', the length of the change."""
    unit: Tensor | float = 1.0
    """The length of a radius of 1, which broadcasts to the input."""
    low: Tensor | float | None = None
    """The least value of an input, which broadcasts to it; None for no bound."""
    high: Tensor | float | None = None
    """The largest value."""
    mask: Tensor | None = None
    """Where the input may change: bool, [B, ...], which broadcasts to it; None for everywhere."""
    vector: int | None = None
    """How many trailing dimensions are one vector for the norm '2'; None for all but the first."""

    def __post_init__(self) -> None:
        check_number(self, "radius", "(0, inf)", "choose a number above 0")
        if self.norm not in NORMS:
            raise ValueError(f"norm is {self.norm!r}: choose {' or '.join(NORMS)}")

    def rows(self, rows: Tensor) -> Ball:
        """The ball around some rows [R] of the input."""
        return self if self.mask is None else replace(self, mask=self.mask[rows])

    def start(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random point around x [B, ...], evenly distributed over the ball, then cut."""
        if self.norm == "inf":
            noise = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device) * 2 - 1
            return self.project(x + self.radius * self.unit * noise, x)
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        lengths = self._lengths(noise)
        size = x[0].numel() if self.vector is None else x.shape[-self.vector :].numel()
        share = torch.rand(lengths.shape, generator=generator, dtype=x.dtype).to(x.device) ** (1 / size)
        return self.project(x + self.radius * self.unit * noise / lengths * share, x)

    def step(self, gradient: Tensor, size: Tensor | float) -> Tensor:
        """The change of the input along a gradient [B, ...], of `size` in units: a sign step, or one of that length."""
        if self.norm == "inf":
            return size * self.unit * gradient.sign()
        upward = gradient * self.unit  # the gradient with respect to units
        return size * self.unit * upward / self._lengths(upward)

    def project(self, moved: Tensor, x: Tensor) -> Tensor:
        """The point of the ball around x that is next to `moved`, then cut to the range, which x has to be in."""
        change = (moved - x) / self.unit
        if self.norm == "inf":
            change = change.clamp(-self.radius, self.radius)
        else:
            change = change * (self.radius / self._lengths(change)).clamp(max=1)
        if self.mask is not None:
            change = change.where(self.mask, 0)
        inside = x + change * self.unit
        if self.low is not None:
            inside = inside.maximum(torch.as_tensor(self.low, dtype=x.dtype, device=x.device))
        if self.high is not None:
            inside = inside.minimum(torch.as_tensor(self.high, dtype=x.dtype, device=x.device))
        return inside

    def distance(self, moved: Tensor, x: Tensor) -> Tensor:
        """The largest change of each row [B], in units of the radius: at most 1, up to rounding."""
        change = (moved - x) / self.unit / self.radius
        sizes = change.abs() if self.norm == "inf" else self._lengths(change)
        return sizes.flatten(1).amax(1)

    def _lengths(self, change: Tensor) -> Tensor:
        """The length of each vector, kept as dimensions of size 1."""
        dims = tuple(range(1, change.ndim)) if self.vector is None else tuple(range(-self.vector, 0))
        return torch.linalg.vector_norm(change, dim=dims, keepdim=True).clamp(min=TINY)

"""The changes of an input that an attack may choose from: a ball around it, cut by the range of inputs.

    |(x' - x) / unit|_p <= radius,  low <= x' <= high,  x' = x where `mask` is False

`unit` is the length that a radius of 1 has in the input: 1 / std for an image that a processor has normalised, if the
radius is of pixels from 0 to 1. For p = 2 the norm is over all that belongs to one vector: an image, or a token.

Source: Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv:1706.06083.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..options.ranges import check_number

NORMS = ("inf", "2")
TINY = 1e-12


@dataclass(frozen=True)
class Ball:
    """A ball around each row of an input; see the module's docstring.

    A tensor among its fields has as many dimensions as the input, the first of 1 or of B rows.

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
        fields = {name: getattr(self, name) for name in ("unit", "low", "high", "mask")}
        parts: dict[str, Any] = {n: v[rows] for n, v in fields.items() if isinstance(v, Tensor) and _of_rows(v)}
        return replace(self, **parts) if parts else self

    def start(self, x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """A random point around each row of x [B, ...], evenly distributed over the ball, then cut.

        Args:
            x: The centers.
            generator: Where random numbers are from, on the CPU: one for all rows, or one for each.
        """
        if self.norm == "inf":
            noise = _random(torch.rand, x.shape, generator).to(x) * 2 - 1
            return self.project(x + self.radius * self.unit * noise, x)
        noise = self._masked(_random(torch.randn, x.shape, generator).to(x))
        lengths = self._lengths(noise)
        size = x[0].numel() if self.vector is None else x.shape[-self.vector :].numel()
        share = _random(torch.rand, lengths.shape, generator).to(x) ** (1 / size)
        return self.project(x + self.radius * self.unit * noise / lengths * share, x)

    def step(self, gradient: Tensor, size: Tensor | float) -> Tensor:
        """The change of the input along a gradient [B, ...]: a sign step, or one of a length.

        Args:
            gradient: With respect to the input; where it is not finite, nothing is changed.
            size: In units, a number or one that broadcasts to the input.
        """
        gradient = gradient.nan_to_num(0, 0, 0)
        if self.norm == "inf":
            return size * self.unit * gradient.sign()
        upward = self._masked(gradient * self.unit)  # the gradient with respect to units
        upward = upward / upward.abs().amax(self._dims(upward), keepdim=True).clamp(min=torch.finfo(upward.dtype).tiny)
        return size * self.unit * upward / self._lengths(upward)

    def project(self, moved: Tensor, x: Tensor) -> Tensor:
        """The point of the ball around x that is next to `moved`, then cut to the range, which x has to be in."""
        self._check(x)
        change = self._masked((moved - x) / self.unit)
        if self.norm == "inf":
            change = change.clamp(-self.radius, self.radius)
        else:
            change = change * (self.radius / self._lengths(change)).clamp(max=1)
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

    def _masked(self, change: Tensor) -> Tensor:
        return change if self.mask is None else change.where(self.mask, 0)

    def _dims(self, change: Tensor) -> tuple[int, ...]:
        """The dimensions of a vector."""
        return tuple(range(1, change.ndim)) if self.vector is None else tuple(range(-self.vector, 0))

    def _lengths(self, change: Tensor) -> Tensor:
        """The length of each vector, kept as dimensions of size 1."""
        return torch.linalg.vector_norm(change, dim=self._dims(change), keepdim=True).clamp(min=TINY)

    def _check(self, x: Tensor) -> None:
        for name in ("unit", "low", "high", "mask"):
            value = getattr(self, name)
            if isinstance(value, Tensor) and value.ndim not in (0, x.ndim):
                raise ValueError(f"{name} has {value.ndim} dimensions, the input {x.ndim}: give it as many")


def _of_rows(value: Tensor) -> bool:
    return value.ndim > 0 and len(value) > 1


def _random(draw: Callable[..., Tensor], shape: Sequence[int], generator: Any) -> Tensor:
    """Random numbers on the CPU, of one generator, or of one for each row."""
    if isinstance(generator, Sequence):
        return torch.stack([draw(*shape[1:], generator=each) for each in generator])
    return draw(*shape, generator=generator)

"""NoiseFiT's adaptive Gaussian noise on the hidden states of a few layers, and its strength in every layer.

Per element of a layer's output h, the noise has standard deviation

    s . mad . exp(-beta |h - med| / mad) . exp(min(var / mean var, log 5))      s = sigma^power std(h)

(median, median deviation and variance over the features of a token; std and mean over all tokens that are not padding;
no gradient). The noise grows with the square of the activations, so its strength relative to them differs from layer to
layer: `strengths` measures it.

Source: Khadangi et al. 2025, arXiv:2504.03302, with the authors' code, github.com/akhadangi/NoiseFiT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..system import renamed

BETA = 0.1  # how fast the noise of a feature falls with its distance from the token's median
LARGEST_FACTOR = 5.0
PASSES = 10  # noise samples over which a layer's signal-to-noise ratio is averaged


@torch.no_grad()
def noise_scale(h: Tensor, sigma: float, mask: Tensor | None = None) -> Tensor:
    """The standard deviation of the noise on every element of h [B, T, H]; `mask` [B, T] is 0 at padding.

    Medians are torch's: for an even number of elements, the lower one of the two in the middle.
    """
    h, keep = h.float(), _kept(h, mask)
    variance = h.var(-1, keepdim=True)
    relative_variance = variance / (variance[keep].mean() + 1e-6)
    median = h.median(-1, keepdim=True).values
    distance = (h - median).abs()
    deviation = torch.maximum(distance.median(-1, keepdim=True).values, 1e-6 * h.norm(dim=-1, keepdim=True))
    factor = relative_variance.clamp(max=math.log(LARGEST_FACTOR)).exp()  # clamped before exp, which could overflow
    return sigma * h[keep].std() * deviation * torch.exp(-BETA * distance / (deviation + 1e-6)) * factor


class Noise:
    """Forward hooks of layers that add noise to the last two thirds of their outputs in training mode.

    Args:
        sigma: The strength, in units of the activations' standard deviation; 0 adds none.
    """

    def __init__(self, sigma: float):
        self.sigma = sigma
        self.active = False
        self.mask: Tensor | None = None  # [B, T] of one third
        self.dim = 0  # the dimension along which the thirds are concatenated: 1 in a packed batch
        self.handles: list[Any] = []

    def install(self, layers: list[nn.Module]) -> None:
        """Put the hooks on the layers, once."""
        if not self.handles:
            self.handles = [layer.register_forward_hook(self) for layer in layers]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @contextmanager
    def on(self, mask: Tensor | None, dim: int) -> Iterator[None]:
        """A context in which the hooks add noise to batches with this mask, packed along this dimension."""
        self.active, self.mask, self.dim = True, mask, dim
        try:
            yield
        finally:
            self.active, self.mask = False, None

    def __call__(self, layer: nn.Module, _: Any, output: Any) -> Any:
        """The hook."""
        if not (self.active and layer.training and self.sigma):
            return None
        clean, *parts = _first(output).chunk(3, self.dim)
        mask = self.mask
        scales = [noise_scale(part, self.sigma, None if mask is None else mask.to(part.device)) for part in parts]
        disturbed = [h + (torch.randn_like(s) * s).to(h.dtype) for h, s in zip(parts, scales, strict=True)]
        h = torch.cat([clean, *disturbed], self.dim)
        return (h, *output[1:]) if isinstance(output, tuple) else h


@dataclass(frozen=True)
class Strength:
    """How strong noise is, relative to the output of the layer to which it is added."""

    ratio: float  # mean |h| / mean |noise|, the signal-to-noise ratio
    share: float  # standard deviation of the noise / of h


@torch.no_grad()
def strengths(layers: list[nn.Module], forward: Callable[[], Any], sigma: float, mask: Tensor | None) -> list[Strength]:
    """The strength in each layer of noise with s = sigma std(h), on the clean outputs of one forward pass."""
    measured: dict[int, Strength] = {}  # by layer

    def measure(index: int, output: Any) -> None:
        h = _first(output)
        keep, scale = _kept(h, mask), noise_scale(h, sigma, mask)
        noise = torch.stack([(torch.randn_like(scale) * scale).abs()[keep].mean() for _ in range(PASSES)]).mean()
        clean = h.float()[keep]
        share = scale[keep].square().mean().sqrt() / (clean.std() + 1e-6)
        measured[index] = Strength(float(clean.abs().mean() / (noise + 1e-6)), float(share))

    handles = [
        layer.register_forward_hook(lambda _, __, output, index=index: measure(index, output))
        for index, layer in enumerate(layers)
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return [measured[index] for index in range(len(layers))]


def _kept(h: Tensor, mask: Tensor | None) -> Tensor:
    """True where a token is not padding, so also at the virtual tokens that prompt tuning puts before a sequence."""
    if mask is None:
        return torch.ones(h.shape[:2], dtype=torch.bool, device=h.device)
    return pad(mask.bool(), (h.shape[1] - mask.shape[1], 0), value=True)


def _first(output: Any) -> Tensor:
    """The hidden states in a layer's output, which is a tensor, or a tuple that begins with them."""
    return output[0] if isinstance(output, tuple) else output


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)

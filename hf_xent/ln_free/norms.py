"""Norms that can be removed one by one while a model trains.

    real     (x - mu) / sigma_x * weight + bias          sigma_x = sqrt(var(x) + eps), of every token
    removed  (x - mu) / sigma   * weight + bias          sigma, one constant per norm: an affine map
    between  (x - mu) / sigma_x^(1 - a) sigma^a * weight + bias                     0 < a < 1, the share that is removed

(without mu, and with the root mean square for sigma_x, in RMSNorms). While a norm is real, sigma follows the mean of
sigma_x over the tokens that are not padding, once per forward pass in training mode, and never in evaluation:

    sigma <- momentum sigma + (1 - momentum) mean sigma_x           the first batch sets it

or their median (ours), which does not move when the residual of one token explodes, as it may after gated MLPs without
norms: with the mean, that token would spoil the divisor of all others.

Source: Baroni et al. 2025, arXiv:2507.02559, with their code, github.com/submarat/removing-layer-norm; the predecessor
is Heimersheim 2024, arXiv:2409.13710. RMSNorm, shares and the median are ours.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..system import renamed

FORMER_SHARE = "gone"
"""The name of the buffer `removed_share` in older checkpoints."""


class Watch:
    """The state of the current forward pass, which hooks on a model set and its norms read."""

    def __init__(self, median: bool) -> None:
        self.median = median  # whether sigma follows the median, not the mean
        self.always = False  # whether sigma follows passes in evaluation mode too, as for calibration
        self.live = False  # whether sigma follows now; not while activation checkpointing recomputes a layer
        self.keep: Tensor | None = None  # [B, T], zero at padding

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook before the model's forward pass."""
        arguments = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
        mask = arguments.get("attention_mask")
        self.keep = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.live = model.training or self.always

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """The hook after the forward pass, even if it failed."""
        self.live, self.keep = False, None


class FakeNorm(nn.Module):
    """The base of the two kinds of removable norms; `sites` are the names of its removable parts."""

    sigma: Tensor
    removed_share: Tensor
    weight: Any
    bias: Any
    eps: Any
    limit: float = math.inf  # of sigma_x / divisor; `clipped` sets it

    def take_over(self, norm: nn.Module, sites: tuple[str, ...], watch: Watch, momentum: float) -> None:
        """Takes over the parameters and the mode of a norm."""
        self.weight, self.bias = norm._parameters.get("weight"), norm._parameters.get("bias")
        self.elementwise_affine = self.weight is not None
        self.sites, self.watch, self.momentum, self.training = sites, watch, momentum, norm.training
        device = next((p.device for p in norm.parameters()), None)
        self.register_buffer("sigma", torch.tensor(float("nan"), device=device))
        self.register_buffer("removed_share", torch.zeros(len(sites), device=device))
        self.shares = [0.0] * len(sites)  # `removed_share` as floats, without a copy from the device
        self.ratio: Tensor | None = None  # first divisor / divisor of values, for the hook of the norm's readers
        self.record_sigma = False  # whether training needs sigma_x, with its gradient
        self.recorded_sigma: Tensor | None = None  # sigma_x [...] of the last pass that sigma followed

    def centered(self, x: Tensor) -> Tensor:
        """The vector that the norm divides by sigma_x."""
        raise NotImplementedError

    def spread(self, x: Tensor) -> Tensor:
        """sigma_x [..., 1], float32."""
        return (self.centered(x.float()).square().mean(-1, keepdim=True) + self.eps).sqrt()

    def affine(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The norm of x with a given divisor."""
        y = self.centered(x) * (1 / sigma).to(x.dtype)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x [..., D], real or removed."""
        if self.record_sigma and self.training:  # also when checkpointing recomputes a layer, which must save the same
            spread = self.spread(x).squeeze(-1)
            self.recorded_sigma = spread if self.watch.live else self.recorded_sigma
        if self.removed:
            return self.affine(x, self.sigma if self.limit == math.inf else self.divisor(self.spread(x), 1))
        if self.watch.live:
            self._update_sigma(x)
        if not any(self.shares):
            return super().forward(x)
        sigma_x = self.spread(x)
        first, *values = (self.divisor(sigma_x, share) for share in self.shares)
        if len(set(self.shares)) > 1:
            self.ratio = first / values[0]
        return self.affine(x, first)

    @property
    def removed(self) -> bool:
        """Whether all of its sites are removed."""
        return all(share == 1 for share in self.shares)

    def divisor(self, sigma_x: Tensor, share: float) -> Tensor:
        """sigma_x^(1 - share) sigma^share, at least sigma_x / limit, for sigma_x [..., 1]; [] if it is sigma alone."""
        if not share:
            return sigma_x
        mixed = self.sigma if share == 1 else sigma_x ** (1 - share) * self.sigma**share
        return mixed if self.limit == math.inf else torch.maximum(mixed, sigma_x / self.limit)

    @torch.no_grad()
    def _update_sigma(self, x: Tensor) -> None:
        spread, keep = self.spread(x).squeeze(-1), self.watch.keep
        if keep is not None and keep.numel() == spread.numel():  # some models flatten tokens before a norm
            spread = spread.where(keep.reshape(spread.shape).bool(), torch.nan)
        batch_sigma = spread.nanmedian() if self.watch.median else spread.nanmean()
        updated = self.momentum * self.sigma + (1 - self.momentum) * batch_sigma
        updated = torch.where(self.sigma.isnan(), batch_sigma, updated)
        self.sigma.copy_(torch.where(batch_sigma.isnan(), self.sigma, updated))  # nan: all tokens are padding

    def switch(self, site: str, share: float) -> None:
        """Removes a share of one of the norm's sites; share 0 restores it."""
        index = self.sites.index(site)
        if share == self.shares[index]:
            return
        if share and not bool(self.sigma.isfinite()):
            raise ValueError(
                f"{site} has no finite sigma: run a batch in training mode first, or hf_xent.ln_free.calibrate; if that"
                " was done, training has diverged"
            )
        self.shares[index] = share
        self.removed_share[index] = share

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        sigma, share = self.sigma, self.removed_share
        super()._apply(fn, recurse)
        self.sigma = sigma.to(self.sigma.device)  # float32 in any model
        self.removed_share = share.to(self.removed_share.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}{FORMER_SHARE}" in state_dict:
            state_dict[f"{prefix}removed_share"] = state_dict.pop(f"{prefix}{FORMER_SHARE}")
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.shares = self.removed_share.tolist()


class FakeLayerNorm(FakeNorm, nn.LayerNorm):
    """A removable LayerNorm."""

    def centered(self, x: Tensor) -> Tensor:
        """x - mu."""
        return x - x.mean(-1, keepdim=True)


class FakeRMSNorm(FakeNorm, nn.RMSNorm):
    """A removable RMSNorm."""

    def centered(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


@contextmanager
def clipped(model: nn.Module, limit: float = 2.0) -> Iterator[None]:
    """Within it, no removed norm returns a vector that is more than `limit` times as long as that of the real norm.

        (x - mu) / max(sigma, sigma_x / limit) * weight + bias

    A norm is still an affine map of every token with sigma_x <= limit sigma; it divides the others again. This keeps
    models from overflow whose gated MLPs square what no norm divides. It acts in training and in evaluation, ends with
    the context, and is part of no checkpoint.

    Args:
        model: A model whose norms are removable: after `wrap`, or from `load`.
        limit: At least 1, which is the real norm for every token that is longer than sigma.

    Raises:
        ValueError: The limit is below 1, or the model has no removable norms.

    Source: ours (docs/results/ln_free.md).
    """
    if not limit >= 1:
        raise ValueError(f"limit is {limit}: choose 1 or more, such as 2")
    norms = list(fake_norms(model).values())
    before = [norm.limit for norm in norms]
    try:
        for norm in norms:
            norm.limit = limit
        yield
    finally:
        for norm, earlier in zip(norms, before, strict=True):
            norm.limit = earlier


def fake_norms(model: nn.Module) -> dict[str, FakeNorm]:
    """A model's removable norms by module name. Raises: ValueError if it was not wrapped."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, FakeNorm)}
    if not norms:
        raise ValueError(f"{type(model).__name__} has no removable norms: call hf_xent.ln_free.wrap(model) first")
    return norms


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)

"""Norms that can be taken away one by one while a model trains.

    real     (x - mu) / sigma_x * weight + bias          sigma_x = sqrt(var(x) + eps), of every token
    removed  (x - mu) / sigma   * weight + bias          sigma, one constant a norm: an affine map
    between  (x - mu) / sigma_x^(1 - a) sigma^a * weight + bias                     0 < a < 1, the share that is removed

(without mu, and with the root mean square for sigma_x, in RMSNorms). While a norm is real, sigma follows the mean of
sigma_x over the tokens that are no padding, once a forward pass in training mode, and never in evaluation:

    sigma <- momentum sigma + (1 - momentum) mean sigma_x           the first batch sets it

or their median (ours), which does not move when the residual of one token explodes, as it may behind gated MLPs whose
norms are gone: with the mean, that token undoes the divisor of all others.

`wrap` puts these in the places of a model's norms, under their own names and with their own parameters, so attention,
KV cache, padding, checkpointing and the weights' names stay as they were. A norm that attention reads is removed in two
steps, for queries and keys (and whatever else reads it) and for values: in between, the values' inputs are rescaled by
the ratio of the two divisors. Both share one sigma, live until the second step, as in the authors' code: a stock norm
holds no two. `momentum` 0.9 is the authors' (their runs of the two larger sizes use 0.9^(micro batch / 32)).

Source: Baroni et al. 2025, arXiv:2507.02559, with their code, github.com/submarat/removing-layer-norm; the predecessor
is Heimersheim 2024, arXiv:2409.13710. RMSNorm, shares and finding norms by structure are ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..models.contexts import eval_mode
from ..options.ranges import is_number
from .structure import Norm, trace

Model = TypeVar("Model", bound=nn.Module)
KINDS = ("mlp", "qk", "v", "final")
"""What is removed apart, in the paper's order."""
FINAL = (KINDS[3],)
"""The sites of the norm before the head."""
MOMENTUM = 0.9
"""Of sigmas, unless another is chosen."""


@dataclass(frozen=True)
class Site:
    """One removable normalization, as it stands: `name` is 'mlp.3', 'qk.3', 'v.3' or 'final'."""

    name: str
    kind: str
    layer: int | None
    norm: str  # the module's name in the model
    share: float  # removed, 0 to 1
    sigma: float  # nan until a batch was seen

    @property
    def removed(self) -> bool:
        """Whether nothing normalizes here any more."""
        return self.share == 1


class Watch:
    """What norms are told about the pass under way, by hooks on their model."""

    def __init__(self, median: bool) -> None:
        self.median = median  # which sigma follows; or the mean
        self.always = False  # also in evaluation: calibration
        self.live = False  # within a forward that counts; not while a checkpoint computes a layer again
        self.keep: Tensor | None = None  # [B, T], zero at padding

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the model's forward."""
        given = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
        mask = given.get("attention_mask")
        self.keep = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.live = model.training or self.always

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """After it, even a failed one."""
        self.live, self.keep = False, None


class FakeNorm(nn.Module):
    """What the two kinds of removable norms share; `sites` are the names of what is removed in them."""

    sigma: Tensor
    gone: Tensor
    weight: Any
    bias: Any
    eps: Any

    def arm(self, norm: nn.Module, sites: tuple[str, ...], watch: Watch, momentum: float) -> None:
        """Take over a norm's parameters and mode."""
        self.weight, self.bias = norm._parameters.get("weight"), norm._parameters.get("bias")
        self.elementwise_affine = self.weight is not None
        self.sites, self.watch, self.momentum, self.training = sites, watch, momentum, norm.training
        device = next((p.device for p in norm.parameters()), None)
        self.register_buffer("sigma", torch.tensor(float("nan"), device=device))
        self.register_buffer("gone", torch.zeros(len(sites), device=device))
        self.shares = [0.0] * len(sites)  # `gone`, without asking the device
        self.ratio: Tensor | None = None  # values' divisor against the other, from this norm to its readers
        self.measured = False  # whether training asks for sigma_x, with its gradient
        self.measure: Tensor | None = None  # sigma_x [...] of the last pass that counted

    def centered(self, x: Tensor) -> Tensor:
        """What is divided."""
        raise NotImplementedError

    def spread(self, x: Tensor) -> Tensor:
        """sigma_x [..., 1], float32."""
        return (self.centered(x.float()).square().mean(-1, keepdim=True) + self.eps).sqrt()

    def affine(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The norm with another divisor than its own."""
        y = self.centered(x) * (1 / sigma).to(x.dtype)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x [..., D], real or removed."""
        if self.measured and self.training:  # within a checkpoint's second pass, too, which must repeat the first
            spread = self.spread(x).squeeze(-1)
            self.measure = spread if self.watch.live else self.measure
        if self.removed:
            return self.affine(x, self.sigma)
        if self.watch.live:
            self._follow(x)
        if not any(self.shares):
            return super().forward(x)
        own = self.spread(x)
        first, *values = (self.divisor(own, share) for share in self.shares)
        if len(set(self.shares)) > 1:
            self.ratio = first / values[0]
        return self.affine(x, first)

    @property
    def removed(self) -> bool:
        """Whether all of its sites are."""
        return all(share == 1 for share in self.shares)

    def divisor(self, own: Tensor, share: float) -> Tensor:
        """sigma_x^(1 - share) sigma^share of own = sigma_x [..., 1], [..., 1] or []."""
        if share == 1:
            return self.sigma
        return own ** (1 - share) * self.sigma**share if share else own

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        spread, keep = self.spread(x).squeeze(-1), self.watch.keep
        if keep is not None and keep.numel() == spread.numel():  # some models flatten tokens before a norm
            spread = spread.where(keep.reshape(spread.shape).bool(), torch.nan)
        middle = spread.nanmedian() if self.watch.median else spread.nanmean()
        moved = self.momentum * self.sigma + (1 - self.momentum) * middle
        moved = torch.where(self.sigma.isnan(), middle, moved)
        self.sigma.copy_(torch.where(middle.isnan(), self.sigma, moved))  # nan: nothing but padding

    def switch(self, site: str, share: float) -> None:
        """Remove a share of one of the norm's sites; none puts it back."""
        index = self.sites.index(site)
        if share == self.shares[index]:
            return
        if share and not bool(self.sigma.isfinite()):
            raise ValueError(
                f"{site} has no finite sigma: run a batch in training mode first, or hf_xent.ln_free.calibrate; if that"
                " was done, training has diverged"
            )
        self.shares[index] = share
        self.gone[index] = share

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        sigma, gone = self.sigma, self.gone
        super()._apply(fn, recurse)
        self.sigma, self.gone = sigma.to(self.sigma.device), gone.to(self.gone.device)  # float32 in any model
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.shares = self.gone.tolist()


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


class _Values:
    """The hook on a norm's reader that makes values: gives them the norm that is theirs while the two differ."""

    def __init__(self, norm: FakeNorm, values: Tensor):
        self.norm, self.values = norm, values

    def __call__(self, reader: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        ratio, self.norm.ratio = self.norm.ratio, None
        if ratio is None:
            return None
        bias = 0.0 if self.norm.bias is None else self.norm.bias
        own = (args[0] - bias) * ratio.to(args[0].dtype) + bias
        return torch.where(self.values.to(output.device), reader.forward(own), output)


def wrap(model: Model, *, momentum: float | None = None, median: bool | None = None) -> Model:
    """Make the norms of a causal LM removable, in place; returns the same model. Wrapping again changes options alone.

    momentum: of every norm's sigma; 0.9, or as it was. median: sigma follows the median of the tokens' divisors, not
    their mean; the mean, or as it was.

    Raises: ValueError for a momentum outside [0, 1], adapters, or a norm that no linear layer reads (as on queries and
    keys, or after a block).
    """
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum is {momentum}: choose one from 0, the last batch alone, to 1, the first one alone")
    wrapped = [m for m in model.modules() if isinstance(m, FakeNorm)]
    for fake in wrapped:
        fake.momentum = fake.momentum if momentum is None else momentum
        fake.watch.median = fake.watch.median if median is None else median
    if wrapped:
        return model
    if hasattr(model, "peft_config"):
        raise ValueError("model has adapters: removing norms trains all weights, merge the adapters first")
    found = trace(model)
    _refuse(model, found.others, found.norms)
    from .card import usage  # late: cards import this module

    watch, mlps = Watch(bool(median)), 0
    for norm in found.norms:
        names: tuple[str, ...]
        if norm.layer is not None:
            names = (f"qk.{norm.layer}", f"v.{norm.layer}")
        elif any(part.isdigit() for part in norm.name.split(".")):  # in a list of layers
            names, mlps = (f"mlp.{mlps}",), mlps + 1
        else:
            names = FINAL
        _replace(model, norm, names, watch, MOMENTUM if momentum is None else momentum)
    model.register_forward_pre_hook(watch.begin, with_kwargs=True)
    model.register_forward_hook(watch.end, always_call=True)
    model.hub_usage = usage  # type: ignore[assignment]  # a function of the model that hf_xent.hub asks for
    return model


def _refuse(model: nn.Module, others: list[str], norms: list[Norm]) -> None:
    odd = [f"no linear layer reads {norm.name}" for norm in norms if not norm.readers]
    odd += [f"several layers make values of {norm.name}" for norm in norms if len(norm.values) > 1]
    odd += [f"{name} normalizes in a way of its own" for name in others]
    odd += [] if norms else ["no LayerNorm or RMSNorm was met in it"]
    if odd:
        raise ValueError(
            f"model is a {type(model).__name__}: {odd[0]}; norms can be removed where each is a LayerNorm or an RMSNorm"
            " that linear layers read, as in GPT-2, Llama, GPT-NeoX and OPT"
        )


def _replace(model: nn.Module, norm: Norm, sites: tuple[str, ...], watch: Watch, momentum: float) -> None:
    kind: Any = FakeLayerNorm if norm.center else FakeRMSNorm
    fake = kind(norm.width, eps=norm.eps, elementwise_affine=False)
    fake.arm(norm.module, sites, watch, momentum)
    model.set_submodule(norm.name, fake)
    for reader, values in norm.values.items():
        model.get_submodule(reader).register_forward_hook(_Values(fake, values))


def fake_norms(model: nn.Module) -> dict[str, FakeNorm]:
    """A model's removable norms by module name. Raises: ValueError if it was not wrapped."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, FakeNorm)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no removable norms: call hf_xent.ln_free.wrap(model) first")
    return found


def sites(model: nn.Module) -> list[Site]:
    """What can be removed, in the paper's order: MLPs, queries and keys, values, each from the first layer, the end.

    Raises: ValueError if the model was not wrapped.
    """
    found = []
    for name, norm in fake_norms(model).items():
        for site, share in zip(norm.sites, norm.shares, strict=True):
            kind, _, layer = site.partition(".")
            found.append(Site(site, kind, int(layer) if layer else None, name, share, float(norm.sigma)))
    return sorted(found, key=lambda site: (KINDS.index(site.kind), site.layer or 0))


def is_ln_free(model: nn.Module) -> bool:
    """Whether nothing in a causal LM normalizes: norms are removed, gone, or drowned by their eps.

    Runs a few tokens: what counts is what its modules do, whatever they are called.
    """
    if any(not m.removed for m in model.modules() if isinstance(m, FakeNorm)):
        return False
    found = trace(model)
    return not found.others and not any(norm.acts for norm in found.norms)


def remove(model: nn.Module, site: str, share: float = 1.0) -> None:
    """Freeze a site's divisor at its sigma, or remove a share of the norm, a in [0, 1]; does nothing twice.

    Raises: ValueError for an unknown site, another share, or a norm that has seen no batch yet.
    """
    if not is_number(share, "[0, 1]"):
        raise ValueError(f"share is {share!r}: choose one from 0, the norm itself, to 1, none")
    _norm_of(model, site).switch(site, float(share))


def restore(model: nn.Module, site: str) -> None:
    """Normalize at a site again. Raises: ValueError for an unknown site."""
    _norm_of(model, site).switch(site, 0.0)


def _norm_of(model: nn.Module, site: str) -> FakeNorm:
    norms = {name: norm for norm in fake_norms(model).values() for name in norm.sites}
    if site not in norms:
        raise ValueError(f"site is {site!r}, not one of {type(model).__name__}'s: {', '.join(sorted(norms))}")
    return norms[site]


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[dict[str, Any]]) -> None:
    """Set every real norm's sigma to the mean over batches of model inputs, without training.

    Batches of nothing but padding do not count. Raises: ValueError if no batch has a token, or as `sites`.
    """
    norms, count = list(fake_norms(model).values()), 0
    momenta, watch = [norm.momentum for norm in norms], norms[0].watch
    watch.always = True
    try:
        with eval_mode(model):
            for batch in batches:
                mask = batch.get("attention_mask")
                if mask is not None and not mask.any():
                    continue
                for norm in norms:
                    norm.momentum = count / (count + 1)
                    if not count and not norm.removed:
                        norm.sigma.fill_(float("nan"))
                model(**batch)
                count += 1
    finally:
        watch.always = False
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not count:
        raise ValueError("batches has no batch with a token: pass model inputs, such as [{'input_ids': ids}]")

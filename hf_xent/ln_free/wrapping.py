"""Preparation of a model for norm removal: `wrap` replaces its norms by removable ones.

These have the same names and the same parameters, so attention, KV cache, padding, checkpointing and the names of the
weights do not change. A norm that attention reads is removed in two steps, first for queries and keys (and any other
reader), then for values: in between, the values' inputs are rescaled by the ratio of the two divisors. Both share one
sigma, updated until the second step, as in the authors' code: a stock norm cannot hold two. `momentum` 0.9 is the
authors' (their runs of the two larger sizes use 0.9^(micro batch / 32)).

Source: Baroni et al. 2025, arXiv:2507.02559, with their code, github.com/submarat/removing-layer-norm; finding norms by
structure is ours.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..hub import Usage
from .norms import FakeLayerNorm, FakeNorm, FakeRMSNorm, Watch
from .removal import FINAL, sites
from .structure import Norm, trace

Model = TypeVar("Model", bound=nn.Module)
MOMENTUM = 0.9
"""The default momentum of every norm's sigma."""
LOAD = 'from hf_xent import ln_free\n\nmodel, tokenizer = ln_free.load("PLACE")'
REMOVABLE = """\
{removed}. Divisors and removals are in the checkpoint beside
the stock weights, where hf_xent reads them; **a stock class (`AutoModel...`) leaves them out and normalizes again.**
When no norm is left, `hf-xent ln-free convert` makes a checkpoint that loads without hf_xent."""
"""The text on removals in the card of a checkpoint."""


def usage(model: Any) -> Usage:
    """How a saved removable model is loaded, with any number of norms left; `hf_xent.hub` calls it for the card."""
    removable = sites(model)
    left = sum(not site.removed for site in removable)
    removed = (
        f"{left} of {len(removable)} norms are not removed yet" if left else "All norms were removed in fine-tuning"
    )
    return Usage(LOAD, "hf_xent", REMOVABLE.format(removed=removed), "text-generation")


def wrap(model: Model, *, momentum: float | None = None, median: bool | None = None) -> Model:
    """Makes the norms of a causal LM removable, in place. Wrapping again changes only the options.

    Args:
        model: A causal LM of transformers, in training or evaluation mode.
        momentum: Momentum of every norm's sigma, in [0, 1]; None is 0.9, or no change in a wrapped model.
        median: Whether sigma follows the median of the tokens' divisors, not their mean; None is the mean, or no change
            in a wrapped model.

    Returns:
        The same model.

    Raises:
        ValueError: A momentum outside of [0, 1], adapters, or a norm that no linear layer reads (as on queries and
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
    traced = trace(model)
    _check_removable(model, traced.others, traced.norms)

    watch, mlps = Watch(bool(median)), 0
    for norm in traced.norms:
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


def _check_removable(model: nn.Module, others: list[str], norms: list[Norm]) -> None:
    """Raises: ValueError for a model with a norm that cannot be removed, or without norms."""
    reasons = [f"no linear layer reads {norm.name}" for norm in norms if not norm.readers]
    reasons += [f"several layers make values of {norm.name}" for norm in norms if len(norm.values) > 1]
    reasons += [f"{name} normalizes in a way of its own" for name in others]
    reasons += [] if norms else ["no LayerNorm or RMSNorm was met in it"]
    if reasons:
        raise ValueError(
            f"model is a {type(model).__name__}: {reasons[0]}; norms can be removed where each is a LayerNorm or an"
            " RMSNorm that linear layers read, as in GPT-2, Llama, GPT-NeoX and OPT"
        )


def _replace(model: nn.Module, norm: Norm, sites: tuple[str, ...], watch: Watch, momentum: float) -> None:
    fake_class: Any = FakeLayerNorm if norm.center else FakeRMSNorm
    fake = fake_class(norm.width, eps=norm.eps, elementwise_affine=False)
    fake.take_over(norm.module, sites, watch, momentum)
    model.set_submodule(norm.name, fake)
    for reader, values in norm.values.items():
        model.get_submodule(reader).register_forward_hook(_RescaleValues(fake, values))


class _RescaleValues:
    """The hook on a norm's reader that makes values: rescales their input while values have another divisor."""

    def __init__(self, norm: FakeNorm, values: Tensor):
        self.norm, self.values = norm, values

    def __call__(self, reader: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        ratio, self.norm.ratio = self.norm.ratio, None
        if ratio is None:
            return None
        bias = 0.0 if self.norm.bias is None else self.norm.bias
        rescaled = (args[0] - bias) * ratio.to(args[0].dtype) + bias
        return torch.where(self.values.to(output.device), reader.forward(rescaled), output)

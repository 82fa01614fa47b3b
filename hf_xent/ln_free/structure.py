"""Where a model normalizes, found by running it once: no list of classes or module names is needed.

A few random tokens go through the model with a hook on every leaf module.

    norm      a leaf that computes  (x - mu) / sqrt(var + eps) * weight + bias  of its input, or this without mu (RMS)
    reader    a leaf whose input is a norm's output (the same memory, through views, slices and dropout)
    layer     the layer of the attention that reads a norm: the cached values of that layer come from the norm's readers
    values    the output features of a reader that reach the cached values: elsewhere, d values / d output is zero

Norms' outputs are detached from the graph, so that every derivative crosses one reader alone. This derivative tells
separate projections (Llama, OPT), one for all (GPT-2) and one with interleaved heads (GPT-NeoX) apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..models.anatomy import random_tokens
from ..models.contexts import eval_mode_without_autocast

EPS = 1e-5  # of norms without an attribute for it


@dataclass
class Norm:
    """A norm that the traced pass met; `name` is the module's in the model."""

    name: str
    module: nn.Module
    center: bool  # LayerNorm; without it RMSNorm
    acts: bool  # whether the output hardly depends on the input's scale; False if eps is far above the variance
    width: int
    readers: dict[str, nn.Module] = field(default_factory=dict)
    layer: int | None = None  # the layer of attention that reads it, by its index in the cache
    values: dict[str, Tensor] = field(default_factory=dict)  # reader's name -> [out], whether a feature is a value

    @property
    def eps(self) -> float:
        """The constant that is added to the variance."""
        return eps_of(self.module)


@dataclass(frozen=True)
class Trace:
    """One forward pass: the norms in order of execution, and the names of leaves that normalize in another way."""

    norms: list[Norm]
    others: list[str]


def trace(model: nn.Module, tokens: int = 6) -> Trace:
    """Runs a causal LM on a few random tokens to find where it normalizes; the model is not changed."""
    walk = _Walk({module: name for name, module in model.named_modules()})
    leaves = [module for module in model.modules() if not list(module.children())]
    handles = [leaf.register_forward_hook(walk) for leaf in leaves]
    try:
        with eval_mode_without_autocast(model), torch.enable_grad():
            output = model(input_ids=random_tokens(model, 1, tokens), use_cache=True)
            walk.attribute(output.past_key_values)
    finally:
        for handle in handles:
            handle.remove()
    return Trace([norm for norm, _, _ in walk.norms], walk.others)


def eps_of(norm: nn.Module) -> float:
    """The eps of a norm: `eps` in torch and most models, `variance_epsilon` in Llama and its copies."""
    return float(getattr(norm, "eps", getattr(norm, "variance_epsilon", EPS)))


def centered(module: nn.Module, x: Tensor, y: Tensor) -> bool | None:
    """Whether y is the LayerNorm (True) or the RMSNorm (False) of x under a module's parameters; None: neither."""
    vectors = {name: p for name, p in module._parameters.items() if p is not None}
    if not vectors.keys() <= {"weight", "bias"} or any(p.shape != x.shape[-1:] for p in vectors.values()):
        return None
    z, eps = x.detach().float(), eps_of(module)
    for center in (True, False):
        normalized = z - z.mean(-1, keepdim=True) if center else z
        normalized = normalized * (normalized.square().mean(-1, keepdim=True) + eps).rsqrt()
        weight, bias = vectors.get("weight", torch.ones(())).float(), vectors.get("bias", torch.zeros(())).float()
        expected = normalized * weight + bias
        error = (expected - y.detach().float()).norm() / expected.norm().clamp(min=1e-30)
        if error < (3e-2 if y.dtype.itemsize == 2 else 1e-4):
            return center
    return None


@torch.no_grad()
def normalizes(module: nn.Module, x: Tensor) -> bool:
    """Whether a leaf's output hardly depends on the scale of its input, as only a norm's does."""
    has_norm_name = "norm" in type(module).__name__.lower()
    if not has_norm_name and all(p.ndim != 1 for p in module.parameters()):
        return False  # an activation saturates too, but has no parameters
    output, of_scaled, of_zero = (module.forward(z) for z in (x, 4 * x, 0 * x))
    return bool((of_scaled - output).norm() < (output - of_zero).norm() / 2)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class _Walk:
    """The hook on every leaf module in a traced pass."""

    def __init__(self, names: dict[nn.Module, str]):
        self.names = names
        self.norms: list[tuple[Norm, Tensor, dict[str, Tensor]]] = []  # norm, its output, outputs by reader
        self.others: list[str] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], y: Any) -> Tensor | None:
        x = args[0] if args else None
        if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point()) or _same_memory(x, y):
            return None  # embeddings; dropout and identities, which return their input
        name = self.names[module]
        for norm, output, outputs in self.norms:
            if _same_memory(output, x):
                norm.readers[name], outputs[name] = module, y
        if x.shape != y.shape:
            return None
        center, acts = centered(module, x, y), normalizes(module, x.detach())
        if center is None:
            self.others += [name] if acts else []
            return None
        y = y.detach().requires_grad_()
        self.norms.append((Norm(name, module, center, acts, x.shape[-1]), y, {}))
        return y

    def attribute(self, cache: Any) -> None:
        """Sets the layer and the values of the norms that attention reads."""
        outputs = [(norm, name, y) for norm, _, readers in self.norms for name, y in readers.items()]
        leaves = [y for _, _, y in outputs]
        for layer, cached in enumerate(cache.layers if leaves else []):
            values = cached.values
            upstream = torch.rand_like(values) + 0.5
            gradients = torch.autograd.grad(values, leaves, upstream, allow_unused=True, retain_graph=True)
            for (norm, name, _), gradient in zip(outputs, gradients, strict=True):
                if gradient is not None and bool(gradient.any()):
                    norm.layer = layer
                    norm.values[name] = gradient.flatten(0, -2).ne(0).any(0)

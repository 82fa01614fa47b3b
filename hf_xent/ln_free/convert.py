"""Conversion of a model whose norms are removed to the forms that load without hf_xent, and between these forms.

    eps trick   a stock model whose norms hardly normalize:  eps = 1e12, weight = 1e6 gain.  sqrt(var + 1e12) = 1e6, so
                the output is (x - mu) gain + beta.  The format of the released LN-free GPT-2 models
    true        no norms. Into each linear layer y = W n + b that reads n = (x - mu) gain + beta the norm is folded,

                    W' = W diag(gain) (I - 11'/D)        b' = b + W beta        (no mu in RMSNorms)

                also into the head, which is untied from the embeddings and gets a bias. All stock classes have norms,
                so the class comes with the checkpoint (`modeling_ln_free.py`, loaded with trust_remote_code=True)

with gain = weight / sigma for removed norms and weight / sqrt(eps) under the trick. From true back to the trick, gain
is 1; a bias b that folding had to add goes into the norm, beta = 1 and W'' = W' + b 1'/D, exactly, since W' 1 = 0 and
x - mu has mean 0.

The trick has a relative error of var / (2 eps). Its weights, about 1e6 to 1e7, would overflow float16 and give NaN,
which is refused. With eps = 1e6 they fit into float16, at the error that `parity` measures; bfloat16 and float32 hold
both.

Source: the format and the trick are Baroni et al.'s, arXiv:2507.02559, github.com/submarat/removing-layer-norm; folding
is that of TransformerLens (fold_ln), but centering is folded into the readers alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..options.ranges import is_number
from ..system import renamed
from .forms import STATE, class_of, form_of
from .norms import FakeNorm, fake_norms
from .removal import sites
from .structure import eps_of, trace
from .verification import parity

LARGEST = 65504.0  # the largest number in float16
MILD = 1e6  # the eps under which the weights fit into float16


def to_eps_trick(model: Any, eps: float = 1e12, dtype: torch.dtype | None = None) -> Any:
    """Converts a removable or true model to the stock class with a huge `eps` in its norms; it computes the same.

    Args:
        model: A removable model with all norms removed, or a true one.
        eps: The number that replaces the variance, positive and below 1e38.
        dtype: The dtype of the result; None is the model's.

    Returns:
        A new model of the stock class.

    Raises:
        ValueError: Norms are left, the architecture's configuration has no eps (OPT), `eps` is too small against the
            variance, or weights would overflow float16.
    """
    if not is_number(eps, "(0, 1e38)"):  # above it, float32 overflows
        raise ValueError(f"eps is {eps!r}: choose a positive number below 1e38, such as 1e12")
    eps = float(eps)  # configurations require a float
    is_true = form_of(model) == "true"
    if not is_true:
        _check_removed(model)
    config = deepcopy(model.config)
    names = list(config.ln_free["norms"]) if is_true else list(fake_norms(model))
    stock: Any = type(model).__mro__[2] if is_true else type(model)
    for name in ("ln_free", "auto_map") if is_true else ():
        config.__dict__.pop(name, None)
    config.__class__ = stock.config_class
    plain = _untrained(stock, config, model)
    state = _unfolded(model, plain) if is_true else _scaled(model)
    _set_eps(plain, names, eps)
    for name in names:
        state[f"{name}.weight"] = state[f"{name}.weight"] * eps**0.5
    plain.load_state_dict(state)
    if form_of(plain) != "eps trick":
        raise ValueError(f"eps is {eps:g}, under which the model still normalizes: choose a larger one, such as 1e12")
    _check_half(model, plain, names, dtype or _dtype(model), eps)
    return plain.to(dtype or _dtype(model))


def to_true(model: Any, ids: Tensor | None = None) -> Any:
    """Converts a removable or eps-trick model to one without norms, and checks that it computes the same.

    Args:
        model: A removable model with all norms removed, or one under the eps trick.
        ids: Token ids [B, T] on which both are compared; None is 32 random ones.

    Returns:
        A new model, of a separate class without norms.

    Raises:
        ValueError: The model still normalizes, or a module other than a linear layer reads a norm.
        RuntimeError: The result differs, for instance since the residual stream itself reads a norm's output.
    """
    form = form_of(model)
    if form == "removable":
        _check_removed(model)
    elif form != "eps trick":
        raise ValueError(f"model is a {type(model).__name__} that is {form}: pass one whose norms were removed")
    with _restored(model):
        norms = trace(model).norms
    state = {name: x.clone() for name, x in model.state_dict().items() if not name.endswith(STATE)}
    readers: dict[str, list[str]] = {}
    biases = []
    for norm in norms:
        gain, beta = _affine(norm.module, norm.width)
        for prefix in ("weight", "bias"):
            state.pop(f"{norm.name}.{prefix}", None)
        readers[norm.name] = list(norm.readers)
        for name, reader in norm.readers.items():
            had_bias = f"{name}.bias" in state
            _fold(state, name, reader, (gain, beta if had_bias or beta.any() else None), norm.center)
            biases += [name] if f"{name}.bias" in state and not had_bias else []
    config = deepcopy(model.config)
    config.tie_word_embeddings, config.ln_free = False, {"norms": readers, "biases": biases}
    stock: Any = type(model)
    true_class: Any = class_of(stock)
    config.__class__ = true_class.config_class  # the same settings, another model type
    true = _untrained(true_class, config, model)
    true.load_state_dict(state)
    true = true.to(_dtype(model))
    error, size = parity(model, true, ids)
    if size != size:  # nan
        raise RuntimeError(f"{type(model).__name__} overflows in every sequence of ids: pass some of its training text")
    if not error <= (5e-2 if _dtype(model).itemsize == 2 else 1e-3) * size:
        raise RuntimeError(
            f"folding the norms of {type(model).__name__} changed its logits by {error:.1e} of {size:.1e}"
        )
    return true


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _check_removed(model: nn.Module) -> None:
    left = [site.name for site in sites(model) if not site.removed]
    if left:
        raise ValueError(f"{len(left)} norms are left, {left[0]} first: train until all are removed, or remove them")


def _untrained(model_class: type, config: Any, model: Any) -> Any:
    """An untrained model with the device and generation options of another, in float32."""
    untrained = model_class(config).float().to(next(model.parameters()).device).eval()
    untrained.generation_config = deepcopy(model.generation_config)
    return untrained


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Makes removed norms normalize until the context ends, so that `trace` recognizes them."""
    fakes = [m for m in model.modules() if isinstance(m, FakeNorm)]
    for fake in fakes:
        fake.shares = [0.0] * len(fake.sites)
    try:
        yield
    finally:
        for fake in fakes:
            fake.shares = fake.removed_share.tolist()


def _affine(norm: Any, width: int) -> tuple[Tensor, Tensor]:
    """Gain and beta [D] of a norm whose divisor is constant, float64."""
    vectors = {name: p.detach().double() for name, p in norm._parameters.items() if p is not None}
    some = next(iter(vectors.values()), torch.ones(1).double())
    divisor = float(norm.sigma) if isinstance(norm, FakeNorm) else eps_of(norm) ** 0.5
    return vectors.get("weight", some.new_ones(width)) / divisor, vectors.get("bias", some.new_zeros(width))


def _fold(state: dict[str, Tensor], name: str, reader: Any, affine: tuple[Tensor, Tensor | None], center: bool) -> None:
    """Folds a norm into the weights of one of its readers, in `state`."""
    weight, (gain, beta) = state[f"{name}.weight"], affine
    transposed = not isinstance(reader, nn.Linear)  # GPT-2's Conv1D holds [in, out]
    if weight.ndim != 2 or (transposed and type(reader).__name__ != "Conv1D"):
        raise ValueError(f"{name}, a {type(reader).__name__}, reads a norm: norms fold into linear layers only")
    w = (weight.T if transposed else weight).double()
    if beta is not None:
        bias = state.get(f"{name}.bias", weight.new_zeros(len(w)))
        state[f"{name}.bias"] = (bias.double() + w @ beta).to(bias.dtype)
    w = w * gain
    w = w - w.mean(1, keepdim=True) if center else w
    state[f"{name}.weight"] = (w.T if transposed else w).to(weight.dtype).contiguous()


def _scaled(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a removable model, those of every norm divided by its sigma, float32."""
    state = {name: x.float() for name, x in model.state_dict().items() if not name.endswith(STATE)}
    for name, norm in fake_norms(model).items():
        if norm.weight is None:
            raise ValueError(f"{name} has no weight that could hold its scale: convert to 'true' instead")
        state[f"{name}.weight"] = state[f"{name}.weight"] / norm.sigma
    return state


def _unfolded(model: Any, plain: Any) -> dict[str, Tensor]:
    """The weights of a true model for a stock one, whose norms get gain 1, float32."""
    state = {name: x.float() for name, x in model.state_dict().items()}
    for norm, readers in model.config.ln_free["norms"].items():
        added = [name for name in readers if name in model.config.ln_free["biases"]]
        vectors = dict(plain.get_submodule(norm).named_parameters())
        state[f"{norm}.weight"] = torch.ones_like(vectors["weight"])
        if "bias" in vectors:
            state[f"{norm}.bias"] = torch.full_like(vectors["bias"], float(bool(added)))
        for name in added:
            bias = state.pop(f"{name}.bias")
            state[f"{name}.weight"] = state[f"{name}.weight"] + bias[:, None] / len(vectors["weight"])
    return state


def _set_eps(model: Any, names: list[str], eps: float) -> None:
    """Sets the eps of a stock model's norms, and of its configuration."""
    norms = [model.get_submodule(name) for name in names]
    config = model.config.get_text_config()
    keys = [key for key, value in config.to_dict().items() if "eps" in key and value == eps_of(norms[0])]
    if len(keys) != 1:
        raise ValueError(
            f"the configuration of {type(model).__name__} does not set its norms' eps, so a stock model would load"
            " without the new one: convert to 'true' instead"
        )
    setattr(config, keys[0], eps)
    for norm in norms:
        setattr(norm, "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps", eps)


def _check_half(model: Any, plain: Any, names: list[str], dtype: torch.dtype, eps: float) -> None:
    largest = max(float(plain.get_submodule(name).weight.detach().abs().max()) for name in names)
    if dtype != torch.float16 or largest <= LARGEST:
        return
    advice = "convert to bfloat16 or float32, or to 'true'"
    if eps > MILD and largest * (MILD / eps) ** 0.5 <= LARGEST:
        error, size = parity(model, to_eps_trick(model, MILD, torch.float32))
        advice += f", or take eps = {MILD:.0e} (logits then differ by {error:.1e} of {size:.1e}, measured in float32)"
    raise ValueError(
        f"eps is {eps:.0e} and dtype float16: norm weights reach {largest:.1e}, above float16's largest number"
        f" {LARGEST:.0f}, so the model would give NaN: {advice}"
    )


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)

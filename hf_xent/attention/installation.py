"""`attend(model, bias)`: a model's own forward runs with another attention, which transformers' registries hold.

The model's configuration names an attention that is registered for this model alone, and a mask for it. The attention
is the one the model had (eager, sdpa or FlexAttention); the mask carries the bias (`masks.py`). Nothing else is
changed, and `unattend` takes back the names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from itertools import count
from typing import Any, TypeVar

from torch import Tensor, nn

from ..patching.heads import inner_of
from .base import AttentionBias
from .masks import block_mask, dense_mask

Model = TypeVar("Model", bound=nn.Module)
BACKENDS = ("eager", "sdpa", "flex_attention")
_NUMBERS = count()
_OF_TOKENS = "attention_mask has the shape {}: with a bias it has to be of tokens, [B, T], or None"


@dataclass
class Attending:
    """A bias on a model, which keeps it as an attribute."""

    bias: AttentionBias
    config: Any  # of the decoder
    backend: str  # the attention that the model had
    heads: int
    layers: int
    name: str = field(default_factory=lambda: f"hf_xent_{next(_NUMBERS)}")
    hooks: tuple[Any, ...] = ()
    masked: bool = False  # whether this forward has asked for a mask
    used: bool = False  # whether a layer has used it

    @property
    def of_layer(self) -> int:
        """The planes of the bias in a layer."""
        return self.bias.planes(self.heads)

    @property
    def planes(self) -> int:
        """The planes of the bias in all layers."""
        return self.of_layer * (self.layers if self.bias.per_layer else 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attending:
        """Refuse it, since the copy would attend by this model's name."""
        raise ValueError("a model with a bias cannot be copied: call unattend, copy it, and attend to both")

    def install(self, inner: nn.Module) -> None:
        """Register both functions and let the model use them."""
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(self.name, self.attention)
        AttentionMaskInterface.register(self.name, self.mask)
        self.config._attn_implementation = self.name
        before = inner.register_forward_pre_hook(self.before_forward, with_kwargs=True)
        self.hooks = (before, inner.register_forward_hook(self.after_forward))
        inner.__dict__["_hf_xent_attending"] = self

    def remove(self, inner: nn.Module) -> None:
        """Leave the model and the registries as they were."""
        from transformers import AttentionInterface, AttentionMaskInterface

        del inner.__dict__["_hf_xent_attending"]
        for handle in self.hooks:
            handle.remove()
        if self.config._attn_implementation == self.name:  # the user may have set another one since
            self.config._attn_implementation = self.backend
        for registry in (AttentionInterface, AttentionMaskInterface):
            registry._global_mapping.pop(self.name)

    def before_forward(self, inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse what would pass the bias by."""
        self.masked = self.used = False
        given = kwargs.get("attention_mask")
        for mask in given.values() if isinstance(given, dict) else [given]:
            if mask is None or len(mask.shape) < 4:
                continue
            if getattr(mask, "_hf_xent_attending", None) == self.name:  # `generate` asked for it beforehand
                self.masked = True
            else:
                raise ValueError(_OF_TOKENS.format(tuple(mask.shape)))
        if self.config._attn_implementation != self.name:
            raise ValueError(
                f"attn_implementation is {self.config._attn_implementation!r} since the bias was set: call attend again"
            )

    def after_forward(self, inner: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Refuse a model whose layers attend by another way."""
        if not self.used:
            raise ValueError(f"{type(inner).__name__} did not use the attention that it was given: it takes no bias")

    def mask(self, **asked: Any) -> Any:
        """What transformers calls for a mask."""
        from transformers.masking_utils import flex_attention_mask, sdpa_mask

        self.masked = True
        if self.backend == "flex_attention":
            mask = block_mask(self.bias, self.planes, flex_attention_mask, asked)
        else:
            mask = dense_mask(self.bias, self.planes, sdpa_mask, asked)
        mask._hf_xent_attending = self.name
        return mask

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        """What the model's layers call: their own attention, with their planes of the mask."""
        if not self.masked or attention_mask is None or not getattr(module, "is_causal", True):
            raise ValueError(
                f"{type(module).__name__} attends without a causal mask of transformers' making: it takes no bias"
            )
        self.used = True
        heads, first = self.of_layer, module.layer_idx * self.of_layer if self.bias.per_layer else 0
        if heads not in (1, query.shape[1]):
            raise ValueError(f"{type(module).__name__} has {query.shape[1]} heads, but the bias is for {heads}")
        if self.backend == "flex_attention":
            kwargs["position_bias"] = attention_mask.bias.of_layer(first, heads > 1)
        elif attention_mask.shape[1] != self.planes:
            raise ValueError(_OF_TOKENS.format(tuple(attention_mask.shape)))
        else:
            attention_mask = attention_mask[:, first : first + heads]
        return attention_of(module, self.backend)(module, query, key, value, attention_mask, **kwargs)


def attention_of(module: Any, backend: str) -> Callable[..., Any]:
    """The function that a layer calls under an attention of transformers: eager ones are in the model's own file."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    home = vars(sys.modules[type(module).__module__])
    if backend == "eager":
        return home["eager_attention_forward"]
    return home.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)[backend]


def attend(model: Model, bias: AttentionBias) -> Model:
    """Add a bias to a model's attention scores, in training, scoring and generation; the model is changed in place.

    Setting another bias replaces the earlier one. Weights stay as they are.

    Args:
        model: A decoder of transformers whose attention is eager, sdpa or flex_attention, also inside wrappers.
        bias: `Harmonic`, `Linear`, `Probabilistic`, `Window`, or an `AttentionBias` of your own.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no attention that takes a bias, or the bias is for another number of heads.
    """
    inner = inner_of(model)
    earlier = attending_of(inner)
    installation = _checked(inner, bias, earlier)
    unattend(model)  # after all checks
    installation.install(inner)
    return model


def unattend(model: Model) -> Model:
    """Undo `attend`; does nothing to a model without a bias.

    Args:
        model: The model, also inside wrappers.

    Returns:
        The same model, as it was before.
    """
    inner = inner_of(model)
    installation = attending_of(inner)
    if installation is not None:
        installation.remove(inner)
    return model


@contextmanager
def attending(model: Model, bias: AttentionBias) -> Iterator[Model]:
    """A context in which a model attends with a bias; afterwards it is as it was before, with an earlier bias or none.

    Args:
        model: As in `attend`.
        bias: As in `attend`.

    Yields:
        The same model.

    Raises:
        ValueError: As in `attend`.
    """
    inner = inner_of(model)
    earlier = attending_of(inner)
    attend(model, bias)
    try:
        yield model
    finally:
        unattend(model)
        if earlier is not None:
            earlier.install(inner)


def attending_of(inner: nn.Module) -> Attending | None:
    """What `attend` has put on a model without wrappers, or None."""
    return inner.__dict__.get("_hf_xent_attending")


def _checked(inner: Any, bias: AttentionBias, earlier: Attending | None) -> Attending:
    """The installation of a bias on a model that takes one, and may have one."""
    from transformers import PreTrainedModel
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = type(inner).__name__
    if not isinstance(bias, AttentionBias):
        raise ValueError(f"bias is {bias!r}: give a Harmonic, Linear, Probabilistic, Window or another AttentionBias")
    if not isinstance(inner, PreTrainedModel) or not inner._supports_attention_backend:
        raise ValueError(f"model is a {name}, whose attention is not of transformers' registry, so it takes no bias")
    config = inner.config.get_text_config(decoder=True)
    if inner.config.is_encoder_decoder or not getattr(config, "num_attention_heads", 0):
        raise ValueError(f"model is a {name}, which is no decoder with attention heads, so it takes no bias")
    backend = config._attn_implementation
    if earlier is not None and backend == earlier.name:
        backend = earlier.backend
    if backend not in BACKENDS:
        raise ValueError(
            f"attn_implementation is {backend!r}, which takes no bias: call model.set_attn_implementation('sdpa') first"
        )
    if backend == "flex_attention" and "position_bias" not in signature(ALL_ATTENTION_FUNCTIONS[backend]).parameters:
        raise ValueError(
            "attn_implementation is 'flex_attention', which takes a bias since transformers 5.24: use 'sdpa'"
        )
    installation = Attending(bias, config, backend, config.num_attention_heads, config.num_hidden_layers)
    bias.planes(installation.heads)  # raises an error if they do not fit
    return installation

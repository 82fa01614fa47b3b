"""A model from its configuration alone, on torch's meta device, and the bytes of its weights and of an optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.loading import explain_load_errors
from ..models.quiet import quiet_loading
from .settings import Settings

BLOCK = 64  # numbers of a 4-bit weight that share a float32 scale
OPTIMIZER_BLOCK, SMALL = 256, 4096  # numbers that share a scale in an 8-bit optimizer; smaller tensors stay in float32


def config_of(model: Any) -> Any:
    """The configuration of a model: a packaged name, path or Hub id, or the content of a config.json.

    Raises: ValueError if there is none, or transformers does not know its type.
    """
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(model, PreTrainedConfig):
        return model
    if not isinstance(model, Mapping):
        with explain_load_errors(str(model)) as source:
            return AutoConfig.from_pretrained(source)
    settings = dict(model)
    try:
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    except KeyError as error:
        raise ValueError("model is a configuration without model_type: give the whole config.json") from error


def build(config: Any, settings: Settings, device: str = "meta") -> Any:
    """The model in training mode, with adapters and checkpointing as the settings say; on meta it takes no memory.

    Raises:
        ValueError: Transformers has no model with a language-modeling head for the configuration.
    """
    if settings.attention == "eager":  # else what transformers chooses: a model may have no other
        config._attn_implementation = "eager"
    dtype = torch.float32 if settings.mixed_precision else getattr(torch, settings.dtype)
    with quiet_loading(), torch.device(device):
        model = _class_of(config).from_config(config, dtype=dtype)
        if settings.peft:
            model = _adapted(model, settings.lora_rank)
    if settings.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.train()


def _class_of(config: Any) -> Any:
    """The automatic class whose head predicts tokens, as the configuration's own architecture does, if that has one."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMaskedLM,
        AutoModelForSeq2SeqLM,
    )

    named = " ".join(getattr(config, "architectures", None) or ())
    classes = [AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoModelForImageTextToText]
    if "ForCausalLM" not in named and "LMHead" not in named and not getattr(config, "is_decoder", False):
        classes = [AutoModelForSeq2SeqLM, AutoModelForMaskedLM, AutoModelForCausalLM, AutoModelForImageTextToText]
    for automatic in classes:
        if type(config) in automatic._model_mapping:
            return automatic
    raise ValueError(
        f"model is a {config.model_type}, for which transformers has no head that predicts tokens: choose a language"
        " model"
    )


def _adapted(model: Any, rank: int) -> Any:
    """The model with LoRA adapters as those of `hf-xent train --lora`."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():  # about how weights are stored, which takes the same memory
        warnings.filterwarnings("ignore", module="peft")
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def weight_bytes(model: nn.Module, *, four_bit: bool) -> int:
    """Bytes of all parameters and buffers, the frozen linear layers but the head in 4 bits if so asked."""
    stored = dict.fromkeys(frozen_linear(model), 0) if four_bit else {}
    plain = sum(_size(x) for x in (*model.parameters(), *model.buffers()) if x not in stored)
    return plain + sum(x.numel() // 2 + x.numel() // BLOCK * 4 for x in stored)


def frozen_linear(model: Any) -> list[Tensor]:
    """The frozen weights of linear layers, without the head, which bitsandbytes leaves as it is."""
    head = model.get_output_embeddings().weight
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return [m.weight for m in layers if not m.weight.requires_grad and m.weight is not head]


def trained(model: nn.Module) -> list[Tensor]:
    """The parameters that have gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of all gradients."""
    return sum(_size(p) for p in trained(model))


def optimizer_bytes(model: nn.Module, name: str) -> tuple[int, int]:
    """Bytes of the optimizer's state, and what a step takes beside it."""
    parameters = trained(model)
    if name == "adamw":  # transformers' default, fused: its step allocates nothing
        return 2 * gradient_bytes(model), 0
    if name == "adafactor":  # one float32 number a row and column, and the update of one tensor in float32 at a time
        factors = [p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim > 1 else p.numel() for p in parameters]
        return 4 * sum(factors), 3 * 4 * max((p.numel() for p in parameters), default=0)
    if name == "adamw_8bit":
        embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}  # transformers: in 32 bits
        return sum(_eight_bit(p, p in embeddings) for p in parameters), 0
    return 0, 0


def _eight_bit(p: Tensor, wide: bool) -> int:
    wide = wide or p.numel() < SMALL
    return 2 * (4 * p.numel() if wide else p.numel() + p.numel() // OPTIMIZER_BLOCK * 4)


def largest_unit(model: Any) -> int:
    """Bytes of the largest part that is gathered at a time where weights are split: a layer, or an embedding."""
    from ..models.anatomy import layers_of

    try:
        units = layers_of(model)
    except ValueError:
        units = []
    parts = (*units, model.get_input_embeddings(), model.get_output_embeddings())
    return max(sum(_size(p) for p in part.parameters()) for part in parts)


def _size(x: Tensor) -> int:
    return x.numel() * x.element_size()


def is_packaged(model: Any) -> bool:
    """Whether a model is a name of a packaged one, which may have to be unpacked first."""
    from ..models.packaged import PACKAGED

    return isinstance(model, str) and model in PACKAGED and not Path(model).is_dir()

"""Loads causal LMs in any form from a folder or the Hub, without remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..models import loading
from .forms import STATE, class_of
from .modeling_ln_free import PREFIX
from .wrapping import wrap


def load(model: str, dtype: Any = "auto") -> tuple[Any, Any]:
    """Loads a causal LM in any form, and its tokenizer; no remote code runs.

    A checkpoint of `LNRemovalTrainer` is loaded as a wrapped model, with the norms removed that were removed in it.

    Args:
        model: A packaged model's name, a checkpoint's folder, or a Hub id.
        dtype: As for `from_pretrained`; 'auto' is the dtype in which the weights were saved.

    Returns:
        The model and its tokenizer, which is None if there is none beside the weights.

    Raises:
        ImportError: A packaged model's package is not installed.
        ValueError: If there is no such model, or its weights are broken.
    """
    from transformers import AutoModelForCausalLM  # here, since the import takes seconds

    with loading.explain_load_errors(model) as source:
        true_class: Any = _true_class(source)
        loaded = (true_class or AutoModelForCausalLM).from_pretrained(source, dtype=dtype)
    buffers = {} if true_class else _removal_buffers(source)
    if buffers:
        wrap(loaded).load_state_dict(buffers, strict=False)
    return loaded, _tokenizer(source, loaded.config)


def _true_class(source: str) -> type | None:
    """The class of a true model, by its configuration; None for any other."""
    from transformers import AutoModelForCausalLM, PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        settings, _ = PreTrainedConfig.get_config_dict(source)
    except OSError:
        return None  # loading the weights then says what is wrong
    if "ln_free" not in settings:
        return None
    stock = CONFIG_MAPPING[settings["model_type"].removeprefix(PREFIX)]
    return class_of(AutoModelForCausalLM._model_mapping[stock])


def _tokenizer(source: str, config: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    empty = len(tokenizer) <= len(tokenizer.all_special_tokens)  # transformers makes an empty one for GPT-2
    return None if empty else tokenizer


def _removal_buffers(source: str) -> dict[str, Tensor]:
    """The buffers of removable norms in a checkpoint that was just loaded from a folder or the Hub."""
    from huggingface_hub import try_to_load_from_cache
    from safetensors import safe_open

    files: list[Any] = [Path(source, "weights")]
    if not Path(source).is_dir():
        files = [try_to_load_from_cache(source, name) for name in ("model.safetensors", "model.safetensors.index.json")]
    folders = {Path(file).parent for file in files if isinstance(file, str | Path)}
    buffers = {}
    for file in sorted(file for folder in folders for file in folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            buffers.update({name: tensors.get_tensor(name) for name in tensors.keys() if name.endswith(STATE)})  # noqa: SIM118  it is not a dict
    return buffers

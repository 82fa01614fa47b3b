"""The model of a recipe, as `trl.ModelConfig` describes it: dtype, attention, quantization and adapters."""

from __future__ import annotations

from typing import Any

from ..models.loading import explain_load_errors, tokenizer_of


def load_causal_lm(arguments: Any) -> tuple[Any, Any]:
    """A causal LM and its tokenizer.

    Args:
        arguments: `trl.ModelConfig`; `model_name_or_path` may be the name of a packaged model.

    Raises:
        ValueError: There is no such model, or no tokenizer beside it.
    """
    from transformers import AutoModelForCausalLM

    return load(AutoModelForCausalLM, arguments), tokenizer_of(arguments.model_name_or_path)


def load(auto_class: Any, arguments: Any, **options: Any) -> Any:
    """The model that an auto class of transformers loads by `trl.ModelConfig`.

    Raises:
        ValueError: There is no such model, or it cannot be loaded this way.
    """
    import torch
    from accelerate import PartialState
    from trl import get_quantization_config

    keywords = {
        "revision": arguments.model_revision,
        "dtype": arguments.dtype or "auto",
        "attn_implementation": arguments.attn_implementation,
    }
    quantization = get_quantization_config(arguments)
    if quantization is not None:
        here = {"": PartialState().local_process_index} if torch.accelerator.is_available() else None
        keywords |= {"quantization_config": quantization, "device_map": here}
    with explain_load_errors(arguments.model_name_or_path) as source:
        return auto_class.from_pretrained(source, **keywords, **options)


def adapted(model: Any, arguments: Any) -> Any:
    """The model with the adapters of `trl.ModelConfig`, if `use_peft` is set; without targets, on all linear layers.

    Raises:
        ValueError: An option of adapters is set, but `use_peft` is not.
    """
    if not arguments.use_peft:
        refuse_idle_adapters(arguments)
        return model
    from peft import get_peft_model, prepare_model_for_kbit_training
    from trl import get_peft_config

    config = get_peft_config(arguments)
    if not config.target_modules and not config.target_parameters:
        config.target_modules = "all-linear"
    if arguments.load_in_4bit or arguments.load_in_8bit:
        model = prepare_model_for_kbit_training(model)
    return get_peft_model(model, config)


def refuse_idle_adapters(arguments: Any) -> None:
    """Raises: ValueError for an option of adapters that is not at its default, without `use_peft`."""
    from dataclasses import fields

    for field in fields(arguments):
        if field.name.startswith("lora_") or field.name in ("use_rslora", "use_dora"):
            value = getattr(arguments, field.name)
            if value != field.default and not arguments.use_peft:
                raise ValueError(f"{field.name} is {value!r}, but use_peft is False: set use_peft, too")

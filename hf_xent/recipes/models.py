"""The model of a recipe, as `trl.ModelConfig` describes it: dtype, attention, quantization and adapters."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from ..models.loading import explain_load_errors, tokenizer_of
from ..models.quiet import without_load_report


def load_causal_lm(arguments: Any) -> tuple[Any, Any]:
    """A causal LM and its tokenizer.

    Args:
        arguments: `trl.ModelConfig`; `model_name_or_path` may be the name of a packaged model.

    Raises:
        ValueError: There is no such model, or no tokenizer beside it.
    """
    from transformers import AutoModelForCausalLM

    return load(AutoModelForCausalLM, arguments), tokenizer_of(arguments.model_name_or_path)


def load(auto_class: Any, arguments: Any, *, new_head: bool = False, **options: Any) -> Any:
    """The model that an auto class of transformers loads by `trl.ModelConfig`.

    Args:
        auto_class: Such as `AutoModelForCausalLM`.
        arguments: `trl.ModelConfig`.
        new_head: Whether weights that the checkpoint lacks are expected, and not reported.
        **options: As for `from_pretrained`.

    Raises:
        ValueError: There is no such model, it cannot be loaded this way, or most of its weights would be new.
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
    quiet = without_load_report() if new_head else nullcontext()
    with explain_load_errors(arguments.model_name_or_path) as source, quiet:
        model, report = auto_class.from_pretrained(source, **keywords, **options, output_loading_info=True)
    _check_loaded(model, report, arguments.model_name_or_path)
    return model


def _check_loaded(model: Any, report: Any, name: str) -> None:
    """Raises: ValueError if most weights are new, as in question answering by a decoder, whose names differ there."""
    missing = set(report["missing_keys"])
    new = sum(p.numel() for key, p in model.named_parameters() if key in missing)
    if 2 * new > sum(p.numel() for p in model.parameters()):
        raise ValueError(
            f"model_name_or_path is {name!r}, whose weights are not those of a {type(model).__name__}, which would"
            " start from random ones: choose another model, such as an encoder"
        )


def adapted(model: Any, arguments: Any, task_type: str | None = None) -> Any:
    """The model with the adapters of `trl.ModelConfig`, if `use_peft` is set.

    Args:
        model: The model.
        arguments: `trl.ModelConfig`.
        task_type: As for `adapters_of`.

    Raises:
        ValueError: An option of adapters is set, but `use_peft` is not.
    """
    config = adapters_of(arguments, task_type)
    if config is None:
        return model
    from peft import get_peft_model, prepare_model_for_kbit_training

    if arguments.load_in_4bit or arguments.load_in_8bit:
        model = prepare_model_for_kbit_training(model)
    return get_peft_model(model, config)


def adapters_of(arguments: Any, task_type: str | None = None) -> Any:
    """The configuration of the adapters; None without `use_peft`. Without targets, they are on all linear layers.

    Args:
        arguments: `trl.ModelConfig`.
        task_type: PEFT's name of what the model does, if `lora_task_type` is not given: 'SEQ_CLS' trains and saves a
            classifier's head, too.

    Raises:
        ValueError: An option of adapters is set, but `use_peft` is not.
    """
    if not arguments.use_peft:
        refuse_idle_adapters(arguments)
        return None
    from trl import get_peft_config

    config = get_peft_config(arguments)
    if task_type is not None and arguments.lora_task_type == "CAUSAL_LM":  # its default
        config.task_type = task_type
    if not config.target_modules and not config.target_parameters:
        config.target_modules = "all-linear"
    return config


def refuse_idle_adapters(arguments: Any) -> None:
    """Raises: ValueError for an option of adapters that is not at its default, without `use_peft`."""
    from dataclasses import fields

    for field in fields(arguments):
        if field.name.startswith("lora_") or field.name in ("use_rslora", "use_dora"):
            value = getattr(arguments, field.name)
            if value != field.default and not arguments.use_peft:
                raise ValueError(f"{field.name} is {value!r}, but use_peft is False: set use_peft, too")

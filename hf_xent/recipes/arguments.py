"""The arguments of a recipe: every field of its data, of its trainer's configuration and of `trl.ModelConfig`.

    parse(recipe, ["--config", "run.yaml", "--learning_rate", "1e-5"])

A file has the same names, as in TRL; `env` in it sets variables of the environment. The command line goes before the
file, the file before the defaults of the recipe.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from .base import Recipe

DEFAULTS: Mapping[str, Any] = {
    "model_name_or_path": "smollm2",
    "logging_steps": 10,
    "logging_first_step": True,
    "disable_tqdm": True,  # the command shows its own progress
}
"""Argument -> its default in all recipes, where that is another one than TRL's or transformers'."""
COMMON = {
    "model_name_or_path": "The model: 'smollm2' (packaged, offline), or any Hub id or path.",
    "dtype": "Dtype of the weights: float32, bfloat16, float16 or auto.",
    "use_peft": "Train LoRA adapters, on all linear layers or on --lora_target_modules.",
    "lora_r": "Rank of the adapters.",
    "load_in_4bit": "Load the model in 4 bits, for adapters on it.",
    "output_dir": "Folder for the model, checkpoints, card, results.json and curves.png.",
    "num_train_epochs": "Passes over the data, unless --max_steps is given.",
    "max_steps": "Optimizer steps.",
    "per_device_train_batch_size": "Rows per forward pass and device.",
    "gradient_accumulation_steps": "Forward passes per optimizer step.",
    "learning_rate": "Peak learning rate.",
    "lr_scheduler_type": "Schedule: linear, cosine, warmup_stable_decay, ...",
    "warmup_steps": "Steps of warm-up, or a share of all steps below 1.",
    "gradient_checkpointing": "Compute activations again in the backward pass.",
    "bf16": "Mixed precision in bfloat16.",
    "logging_steps": "Log after every so many steps.",
    "eval_strategy": "Evaluate in training, too: no, steps or epoch.",
    "save_steps": "Write a checkpoint after every so many steps.",
    "seed": "Seed of everything.",
    "report_to": "none, tensorboard, trackio, wandb, ... or all.",
    "hub_model_id": "Repository for --push, as user/name.",
}
"""The arguments of all recipes that the short help lists, of the hundreds that there are."""


def configuration(recipe: Recipe) -> type:
    """The class of the trainer's configuration."""
    file, _, name = recipe.config.partition(":")
    return getattr(import_module(f"..trainers.{file}", __package__), name)


def parser(name: str, recipe: Recipe, *, with_model: bool = True) -> Any:
    """The parser of a recipe, TRL's, whose errors are exceptions.

    Args:
        name: The command.
        recipe: The recipe.
        with_model: Whether `trl.ModelConfig` is read, too.
    """
    from trl import ModelConfig, TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> Any:
            raise ValueError(f"{message}: `hf-xent {name} --help-all` lists every argument")

    kinds = [recipe.arguments, configuration(recipe), *([ModelConfig] if with_model else [])]
    made = Parser(kinds, prog=f"hf-xent {name}", allow_abbrev=False, add_help=False)
    made.set_defaults_with_config(**_defaults(name, recipe))
    return made


def _defaults(name: str, recipe: Recipe) -> dict[str, Any]:
    import torch

    on_cpu = not torch.accelerator.is_available()
    placed = {"use_cpu": True, "bf16": False} if on_cpu else {}  # TRL's bf16 is an error on a CPU
    return {**DEFAULTS, **placed, "output_dir": f"out/{name.replace(' ', '-')}", **recipe.defaults}


def parse(name: str, recipe: Recipe, arguments: Sequence[str]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The data's arguments, the configuration, the model's arguments, and what was given by the user.

    Args:
        name: The command.
        recipe: The recipe.
        arguments: As on the command line; `--config FILE` may be among them.

    Raises:
        ValueError: An argument is unknown or has a value that it cannot have, or the file is not one of arguments.
    """
    made, arguments = parser(name, recipe), list(arguments)
    settings: dict[str, Any] = {}
    if "--config" in arguments:
        place = arguments.index("--config")
        if place + 1 == len(arguments):
            raise ValueError("config is not given: name a YAML file after --config")
        settings = read_config(Path(arguments[place + 1]))
        del arguments[place : place + 2]
    known = {action.dest for action in made._actions}
    for key in settings:
        if key not in known:
            raise ValueError(f"config has the unknown name {key!r}{near(key, known)}")
    made.set_defaults_with_config(**settings)
    *parsed, rest = made.parse_args_into_dataclasses(arguments, return_remaining_strings=True, look_for_args_file=False)
    if rest:
        unknown = next((word for word in rest if word.startswith("-")), rest[0])
        raise ValueError(f"{unknown} is no argument of `hf-xent {name}`{near(unknown.lstrip('-'), known)}")
    data, config, model = parsed
    names = [(part, field.name) for part in parsed for field in fields(part) if field.init]
    given = {name: getattr(part, name) for part, name in names if name in settings or _is_given(name, arguments)}
    return data, config, model, given


def _is_given(name: str, arguments: Sequence[str]) -> bool:
    flags = {f"--{prefix}{spelled}" for spelled in (name, name.replace("_", "-")) for prefix in ("", "no_", "no-")}
    return any(word.partition("=")[0] in flags for word in arguments)


def near(name: str, known: set[str]) -> str:
    """The end of a message on an unknown name: the one that it is like, or where all are."""
    found = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f": did you mean {found[0]!r}?" if found else ": `--help-all` lists every argument"


def read_config(path: Path) -> dict[str, Any]:
    """The arguments in a YAML file; those under `env` are set in the environment.

    Raises:
        ValueError: The file cannot be read, or holds no names with values.
    """
    import yaml

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config is {path}, which is not a readable YAML file: {error}") from error
    variables = settings.pop("env", None) or {} if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(variables, dict):
        raise ValueError(f"config is {path}, which holds no names with values, such as 'learning_rate: 1e-5'")
    os.environ.update({str(key): str(value) for key, value in variables.items()})
    return settings

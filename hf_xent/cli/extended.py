"""Commands with options of their own that also take a file in TRL's format, TRL's names, and all of a configuration.

    hf-xent classify --config run.yaml --weight_decay 0.01

A name of TRL that the command has an option for is read as that option (`NAMES`); any other field of the trainer's
configuration goes to the trainer as it is. The command line goes before the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typer.core import TyperArgument, TyperCommand

if TYPE_CHECKING:
    from ..recipes.base import Recipe

NAMES = {
    "model_name_or_path": ("model",),
    "dataset_name": ("dataset",),
    "dataset_train_split": ("split",),
    "dataset_text_field": ("column",),
    "eval_rows": ("eval_blocks",),
    "max_length": ("max_length", "block_size"),
    "max_steps": ("steps",),
    "num_train_epochs": ("epochs",),
    "per_device_train_batch_size": ("batch_size",),
    "gradient_accumulation_steps": ("accumulation",),
    "activation_checkpointing": ("gradient_checkpointing",),
    "lora_r": ("lora",),
    "output_dir": ("output",),
    "push_to_hub": ("push",),
}
"""TRL's or transformers' name -> the command's own; the first one that a command has."""
MORE = "hf_xent.more"
"""Where the context of a command has the fields of the configuration that the command has no option for."""
RANK = 16
"""TRL's default of lora_r."""
SWITCHES = {"true": True, "false": False}


class Extended(TyperCommand):
    """A command that takes every field of a trainer's configuration; `extended` names it."""

    configuration: ClassVar[str]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads the file, and takes from the words what the command has no option for."""
        from ..recipes.arguments import read_config

        ctx.default_map, ctx.meta[MORE] = dict(ctx.default_map or {}), {}
        own = {param.name: param for param in self.params}
        words, pairs, foreign, path = _sorted(list(args), own)
        settings = {} if path is None else read_config(path)
        of_file = {name: value for name, value in settings.items() if _own(name, own) or name == "use_peft"}
        self._refuse_repeated(ctx, of_file, own)
        ctx.default_map |= _values(of_file, own) | _values(pairs, own)
        others = {name: value for name, value in settings.items() if name not in of_file}
        if foreign or others:
            command = " ".join(ctx.command_path.split()[1:])
            more, rest = _fields(command, self.configuration, foreign, others, own)
            ctx.meta[MORE], words = more, words + rest
        return super().parse_args(ctx, words)

    @staticmethod
    def _refuse_repeated(ctx: Any, settings: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Raises: ValueError if a file has an option under two names."""
        seen: dict[str, str] = {}
        for name in settings:
            target = _own(name, own) or name
            if target in seen:
                raise ValueError(f"config has {seen[target]} and {name}, which are the same: leave one out")
            seen[target] = name


def extended(configuration: str) -> type[Extended]:
    """The class of a command.

    Args:
        configuration: 'file:class' in `hf_xent.trainers`.
    """
    return type("ExtendedCommand", (Extended,), {"configuration": configuration})


def recipe_of(configuration: str) -> Recipe:
    """A recipe that has a configuration and nothing else, for the parser."""
    from dataclasses import dataclass

    from ..recipes.base import Recipe

    @dataclass
    class Nothing:
        """No arguments of data: the command has its own."""

    return type("Own", (Recipe,), {"config": configuration, "arguments": Nothing})()


def show_all(command: str, configuration: str) -> None:
    """Prints every field of a configuration, with what it means."""
    from ..recipes.arguments import parser

    parser(command, recipe_of(configuration), with_model=False).print_help()


def more_of(context: Any) -> dict[str, Any]:
    """The fields of the configuration that a command was given and has no option for."""
    return dict(context.meta.get(MORE, {}))


def check_push(push: bool, run: Any) -> None:
    """Checks, before anything is loaded, that a run can be pushed at its end.

    Raises:
        ValueError: A run that saves nothing is to be pushed, or a repository is named and not pushed to.
        PermissionError: The Hub says that the login may not write there.
    """
    if push and (not run.save or run.steps == 0):
        raise ValueError("push is given, but the model is not saved: train it, without --no-save")
    if not push and (idle := [name for name in run.more if name.startswith("hub_")]):
        raise ValueError(f"{idle[0]} is given, but push is not: set --push, or leave it out")
    if push:
        from .. import hub

        hub.check_rights(_repository(run.output, run.more))


def pushed(folder: str, more: Mapping[str, Any]) -> str:
    """Pushes a run's folder; returns the repository, `hub_model_id` or the folder's name."""
    from .. import hub

    name = _repository(folder, more)
    hub.push(folder, name, private=more.get("hub_private_repo"))
    return name


def _repository(folder: str, more: Mapping[str, Any]) -> str:
    return str(more.get("hub_model_id") or Path(folder).resolve().name)


def _own(name: str, own: Mapping[str, Any]) -> str | None:
    """The command's own name of an option, for its own or TRL's name in any spelling; None if it has none."""
    key = name.replace("-", "_")
    spelled = {opt.lstrip("-").replace("-", "_"): param.name for param in own.values() for opt in param.opts}
    found = key if key in own else spelled.get(key)
    return found or next((target for target in NAMES.get(key, ()) if target in own), None)


def _sorted(args: list[str], own: Mapping[str, Any]) -> tuple[list[str], dict[str, Any], list[str], Path | None]:
    """The words for the command's options, values of TRL's names, words for the configuration, and the file.

    Raises:
        ValueError: An option is given under two names, or --config without a file.
    """
    words: list[str] = []
    pairs: dict[str, Any] = {}
    foreign: list[str] = []
    path, seen = None, dict[str, str]()
    for flag, values in _chunks(args):
        key = flag.lstrip("-").replace("-", "_")
        if key == "config":
            if not values:
                raise ValueError("config is not given: name a YAML file after --config")
            path, words = Path(values[0]), words + values[1:]
            continue
        target = _own(key, own) if flag.startswith("--") else None
        if target is not None and seen.setdefault(target, key) != key:
            raise ValueError(f"{seen[target]} and {key} are both given, which are the same: leave one out")
        if not flag.startswith("--") or (target and flag in _flags(own[target])):
            words += [flag, *values] if flag else values
        elif target or key == "use_peft":
            pairs[key], rest = _taken(values)
            words += rest
        elif key in ("help", "debug") or (key.startswith("no_") and _own(key[3:], own)):
            words += [flag, *values]
        else:
            foreign += [flag, *values]
    return words, pairs, foreign, path


def _flags(param: Any) -> list[str]:
    return [] if isinstance(param, TyperArgument) else [*param.opts, *param.secondary_opts]


def _chunks(args: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option with the words after it; what stands before the first one has the option ''."""
    flag, values = "", list[str]()
    for word in args:
        if word.startswith("--") and len(word) > 2:
            if flag or values:
                yield flag, values
            flag, equals, value = word.partition("=")
            values = [value] if equals else []
        else:
            values.append(word)
    if flag or values:
        yield flag, values


def _taken(values: list[str]) -> tuple[Any, list[str]]:
    """The value of an option that a command takes under another name, and the words after it."""
    if not values:
        return True, []
    return SWITCHES.get(values[0].lower(), values[0]), values[1:]


def _values(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of the command's parameters. Raises: ValueError for a rank of adapters that are not asked for."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        target = _own(name, own)
        if target is not None:
            is_list = getattr(own[target], "multiple", False)
            found[target] = [value] if is_list and not isinstance(value, list | type(None)) else value
    if "use_peft" in settings or "lora_r" in settings:
        if settings.get("use_peft"):
            found.setdefault("lora", RANK)
        elif "lora_r" in settings:
            raise ValueError(f"lora_r is {settings['lora_r']}, but use_peft is False: set use_peft, too")
    return found


def _fields(
    command: str, configuration: str, words: list[str], settings: Mapping[str, Any], own: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The fields of the configuration that are given, and the words that are none.

    Raises:
        ValueError: A name that neither the command nor the configuration has, or one that has no effect here.
    """
    from ..models.quiet import quiet_loading
    from ..recipes.arguments import near, parser

    made = parser(command, recipe_of(configuration), with_model=False)
    known = {action.dest for action in made._actions}
    spelled = [word.lstrip("-").replace("-", "_") for word in words if word.startswith("--")]
    given = [*settings, *(name.removeprefix("no_") if name not in known else name for name in spelled)]
    for name in given:
        if name not in known:
            raise ValueError(f"{name} is no argument of `hf-xent {command}`{near(name, known | {*own} | {*NAMES})}")
    _refuse(command, given, own)
    made.set_defaults_with_config(**settings)
    options = {"return_remaining_strings": True, "look_for_args_file": False}
    with quiet_loading():
        _, config, rest = made.parse_args_into_dataclasses(words, **options)
    return {name: getattr(config, name) for name in given}, rest


def _refuse(command: str, given: list[str], own: Mapping[str, Any]) -> None:
    """Raises: ValueError for fields that the command's own options decide, or that would be written down."""
    reasons = {"hub_token": "tokens are written nowhere: log in with `hf auth login`, or set HF_TOKEN"}
    if "epochs" not in own:
        reasons["num_train_epochs"] = "the command counts optimizer steps: set --steps"
    for name in given:
        if name in reasons:
            raise ValueError(f"{name} is given, but {reasons[name]}")

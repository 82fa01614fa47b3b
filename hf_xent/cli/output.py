"""The output of commands: one result on standard output, as text or JSON; progress and errors on standard error."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TextIO

import typer
from rich.console import Console

if TYPE_CHECKING:
    from rich.console import RenderableType

out, err = Console(), Console(stderr=True)
_STDOUT: ContextVar[TextIO] = ContextVar("standard output before it was redirected")


def redirect_for_json(context: typer.Context, as_json: bool) -> bool:
    """The callback of --json: output that libraries print meanwhile goes to standard error."""
    if as_json:
        _STDOUT.set(sys.stdout)
        context.with_resource(redirect_stdout(sys.stderr))
    return as_json


def emit(result: Any, *shown: RenderableType, as_json: bool) -> None:
    """Print a command's result, once.

    Args:
        result: The object that --json prints.
        shown: Printed without --json: tables, and lines with the markup of rich, which are not wrapped.
        as_json: Whether --json was given.
    """
    if as_json:
        print(json.dumps(result), file=_STDOUT.get())
        return
    for part in shown:
        is_line = isinstance(part, str)
        out.print(part, highlight=not is_line, soft_wrap=is_line)


def literal(text: str) -> str:
    """The text with its brackets escaped, so that rich does not read them as markup."""
    return text.replace("[", r"\[")

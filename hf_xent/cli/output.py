"""What commands print: one result, for people or as JSON, on standard output; progress and errors beside it."""

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
    """The callback of --json: what libraries print on the way goes to standard error."""
    if as_json:
        _STDOUT.set(sys.stdout)
        context.with_resource(redirect_stdout(sys.stderr))
    return as_json


def emit(result: Any, *shown: RenderableType, as_json: bool) -> None:
    """Print a command's result, once.

    Args:
        result: What --json prints.
        shown: What is printed without it: tables, and lines with rich's markup, which stay as long as they are.
        as_json: Whether --json was given.
    """
    if as_json:
        print(json.dumps(result), file=_STDOUT.get())
        return
    for part in shown:
        line = isinstance(part, str)
        out.print(part, highlight=not line, soft_wrap=line)


def literal(text: str) -> str:
    """Text that rich must not read as markup."""
    return text.replace("[", r"\[")

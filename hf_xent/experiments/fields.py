"""Fields of a dataclass with a help text, from which a command line can be generated."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(help: str, default: Any, **limits: int) -> Any:
    """A dataclass field with a help text; `min` and `max` are the smallest and the largest number allowed."""
    return field(default=default, metadata={"help": help, **limits})

"""Fields of a dataclass that explain themselves, so that a command line can be made of them."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def described(help: str, default: Any, **limits: int) -> Any:
    """A field with a help text; `min` and `max` are the least and the largest number it may be."""
    return field(default=default, metadata={"help": help, **limits})

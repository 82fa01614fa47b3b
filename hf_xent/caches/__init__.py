"""Floor 1: caches of keys and values with fewer bits for older tokens."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # loaded on first access: transformers takes seconds
    from .staircase import StaircaseCache as StaircaseCache

_HOMES = {"StaircaseCache": ".staircase"}
"""Public name -> the module that has it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

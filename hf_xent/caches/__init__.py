"""Floor 1: caches of keys and values with fewer bits for older tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..system.offered import offered

if TYPE_CHECKING:  # loaded on first access: transformers takes seconds
    from .staircase import StaircaseCache as StaircaseCache

_HOMES = {"StaircaseCache": ".staircase"}
"""Public name -> the module that has it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    return offered(__name__, _HOMES, name)

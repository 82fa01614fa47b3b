"""Floor 1: vectors of numbers as digits: a quantiser of each dimension, and a head that predicts digit after digit."""

from __future__ import annotations

from typing import Any

from ..system.offered import offered

_HOMES: dict[str, str] = {}
"""Public name -> the module that has it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    return offered(__name__, _HOMES, name)

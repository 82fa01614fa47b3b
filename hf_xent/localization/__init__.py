"""Floor 3: where a classifier finds its class: masks of images and rationales of texts, learned from labels alone."""

from __future__ import annotations

from typing import Any

from ..system.offered import offered

_HOMES: dict[str, str] = {}
"""Public name -> the module that has it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    return offered(__name__, _HOMES, name)

"""Floor 1: waveforms: spectra, masks of spectra, and the separation of a voice from music."""

from __future__ import annotations

from typing import Any

from ..system.offered import offered

_HOMES: dict[str, str] = {}
"""Public name -> the module that has it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    return offered(__name__, _HOMES, name)

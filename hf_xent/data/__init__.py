"""Floor 1: datasets, each a file and a line in `DATASETS`; text from any source, and its choice by a target.

`load_text` opens any text, `pack` cuts it into blocks, `select` chooses the texts that fit a target.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..system import renamed
from .corpus import LABELS, Corpus
from .formats import Format, PromptFormats
from .registered import DATASETS, load
from .text import load_text, pack

if TYPE_CHECKING:  # loaded on first access: the names of the datasets need no NumPy
    from .selection import Selection, select

__all__ = [
    "DATASETS",
    "LABELS",
    "Corpus",
    "Format",
    "PromptFormats",
    "Selection",
    "load",
    "load_text",
    "pack",
    "select",
]


def __getattr__(name: str) -> Any:
    if name in ("Selection", "select"):
        return getattr(import_module(".selection", __name__), name)
    if name in DATASETS:  # its file
        return import_module(f".{name}", __name__)
    return renamed.attribute(__name__, name)

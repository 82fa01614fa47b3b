"""Floor 1: datasets, each a file and a line in `DATASETS`; `load_text` opens any text, `pack` cuts it into blocks."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..system import renamed
from .corpus import LABELS, Corpus
from .formats import Format, PromptFormats
from .registered import DATASETS, load
from .text import load_text, pack

__all__ = ["DATASETS", "LABELS", "Corpus", "Format", "PromptFormats", "load", "load_text", "pack"]


def __getattr__(name: str) -> Any:
    if name in DATASETS:  # its file
        return import_module(f".{name}", __name__)
    return renamed.attribute(__name__, name)

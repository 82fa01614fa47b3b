"""Floor 1: datasets, one file each, registered by hand; `load_text` opens any text, `pack` cuts it into blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import cities, pydoc
from .formats import Format, PromptFormats
from .text import load_text, pack

if TYPE_CHECKING:
    from datasets import Dataset

DATASETS: dict[str, Callable[..., Dataset]] = {
    "cities": cities.load,
    "pydoc": pydoc.load,
}
"""Dataset name -> loader; a loader takes `split` (None for all rows) and returns a `datasets.Dataset`."""

__all__ = ["DATASETS", "Format", "PromptFormats", "load_text", "pack"]

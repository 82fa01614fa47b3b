"""Floor 4: how each trainer is run from the command line, one file each: its data, its options, its measures.

    hf-xent emo --config run.yaml --learning_rate 1e-5

`run(name, arguments)` does the same in Python. A recipe is registered in `registered.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..system.offered import offered
from .registered import RECIPES

if TYPE_CHECKING:  # loaded on first access: help texts need no torch
    from .base import DataArguments, Recipe
    from .running import run
    from .text import TextArguments, TextRecipe

_HOMES = {
    "DataArguments": ".base",
    "Recipe": ".base",
    "TextArguments": ".text",
    "TextRecipe": ".text",
    "run": ".running",
}
__all__ = ["RECIPES", "DataArguments", "Recipe", "TextArguments", "TextRecipe", "run"]


def __getattr__(name: str) -> Any:
    return offered(__name__, _HOMES, name)

"""Floor 3: retrieval by the loss of a language model: the grid of all losses, rankings of it, and what they are worth.

grid = scores(model, tokenizer, sources, candidates, template="French: {}\\nEnglish:", target=" {}\\n")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..system import renamed

if TYPE_CHECKING:  # loaded on first access: the names of the rankings need no torch
    from .grid import Grid, GridScorer, scores

__all__ = ["Grid", "GridScorer", "scores"]

_HOMES = dict.fromkeys(("Grid", "GridScorer", "scores"), "grid")
"""Public name -> the file that has it."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return renamed.attribute(__name__, name)

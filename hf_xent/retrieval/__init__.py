"""Floor 3: retrieval by the loss of a language model: the grid of all losses, rankings of it, and what they are worth.

grid = scores(model, tokenizer, sources, candidates, template="French: {}\\nEnglish:", target=" {}\\n")
recall_at(rank(grid.sums, "centered"), right, k=5).mean()
mutual_information(model, tokenizer, texts, contexts)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..registry import Registry

if TYPE_CHECKING:  # loaded on first access: the names of the rankings need no torch
    from .grid import Grid, GridScorer, scores
    from .information import Information, Informed, infogain, informed, mutual_information
    from .measures import average_precision_at, interval, recall_at
    from .rankings import rank
    from .reading import WAYS

RANKINGS: Registry[Callable[..., Any]] = Registry(
    "ranking",
    {
        "raw": "rankings:raw",
        "pmi": "rankings:pmi",
        "centered": "rankings:centered",
        "minmax": "rankings:minmax",
        "zscore": "rankings:zscore",
    },
    package=__name__,
)
"""Name -> ranking."""

__all__ = [
    "RANKINGS",
    "WAYS",
    "Grid",
    "GridScorer",
    "Information",
    "Informed",
    "average_precision_at",
    "infogain",
    "informed",
    "interval",
    "mutual_information",
    "rank",
    "recall_at",
    "scores",
]

_HOMES = {
    "WAYS": "reading",
    "rank": "rankings",
    **dict.fromkeys(("Grid", "GridScorer", "scores"), "grid"),
    **dict.fromkeys(("Information", "Informed", "infogain", "informed", "mutual_information"), "information"),
    **dict.fromkeys(("average_precision_at", "interval", "recall_at"), "measures"),
}
"""Public name -> the file that has it."""


def __getattr__(name: str) -> Any:
    return RANKINGS.attribute(name, _HOMES)

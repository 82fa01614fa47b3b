"""Floor 3: retrieval by the loss of a language model: the grid of all losses, rankings of it, and what they are worth.

grid = scores(model, tokenizer, sources, candidates, template="French: {}\\nEnglish:", target=" {}\\n")
recall_at(rank(grid.sums, "centered"), right, k=5).mean()
mutual_information(model, tokenizer, texts, contexts)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .registered import RANKINGS

if TYPE_CHECKING:  # loaded on first access: the names of the rankings need no torch
    from .grid import Grid as Grid
    from .grid import GridScorer as GridScorer
    from .grid import scores as scores
    from .information import Information as Information
    from .information import Informed as Informed
    from .information import infogain as infogain
    from .information import informed as informed
    from .information import mutual_information as mutual_information
    from .measures import average_precision_at as average_precision_at
    from .measures import interval as interval
    from .measures import recall_at as recall_at
    from .rankings import rank as rank
    from .reading import WAYS as WAYS

_HOMES = {
    "WAYS": "reading",
    "rank": "rankings",
    **dict.fromkeys(("Grid", "GridScorer", "scores"), "grid"),
    **dict.fromkeys(("Information", "Informed", "infogain", "informed", "mutual_information"), "information"),
    **dict.fromkeys(("average_precision_at", "interval", "recall_at"), "measures"),
}
"""Public name -> the file that has it."""

__all__ = sorted(("RANKINGS", *RANKINGS.exported, *_HOMES))


def __getattr__(name: str) -> Any:
    return RANKINGS.attribute(name, _HOMES)

"""Floor 1: many-facet Rasch models: a measure of units on an interval scale, free of who judged them on what."""

from __future__ import annotations

from typing import Any

from ..system.offered import offered

_HOMES = {
    "Facet": ".measure",
    "Measure": ".measure",
    "Rasch": ".model",
    "drop_misfits": ".model",
    "expected": ".categories",
    "fit": ".model",
    "probabilities": ".categories",
    "stack": ".tables",
    "variance": ".categories",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:  # scipy waits until a model is fitted
    return offered(__name__, _HOMES, name)

"""Floor 1: many-facet Rasch models: a measure of units on an interval scale, free of who judged them on what."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Facet": "measure",
    "Measure": "measure",
    "Rasch": "model",
    "drop_misfits": "model",
    "expected": "categories",
    "fit": "model",
    "probabilities": "categories",
    "stack": "tables",
    "variance": "categories",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:  # scipy waits until a model is fitted
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

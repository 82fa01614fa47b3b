"""The rankings of a grid of losses, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..registry import Registry

RANKINGS: Registry[Callable[..., Any]] = Registry(
    "ranking",
    {
        "raw": "rankings:raw",
        "pmi": "rankings:pmi",
        "centered": "rankings:centered",
        "minmax": "rankings:minmax",
        "zscore": "rankings:zscore",
    },
    package=__package__,
)
"""Name -> ranking."""

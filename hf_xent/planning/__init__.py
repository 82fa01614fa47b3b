"""Floor 4: how much memory a training step takes, from the configuration of a model alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..system.offered import offered

if TYPE_CHECKING:  # loaded on first access: a plan needs torch and transformers
    from .plans import Peak as Peak
    from .plans import Plan as Plan
    from .plans import plan as plan
    from .settings import GPUS as GPUS
    from .settings import Settings as Settings

_HOMES = {**dict.fromkeys(("Peak", "Plan", "plan"), ".plans"), **dict.fromkeys(("GPUS", "Settings"), ".settings")}
"""Public name -> the module that has it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    return offered(__name__, _HOMES, name)

"""Floor 2: attention with a bias by distance, or over blocks that are drawn by distance."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..system.offered import offered

if TYPE_CHECKING:  # loaded on first access: torch takes a second
    from .base import AttentionBias as AttentionBias
    from .harmonic import Harmonic as Harmonic
    from .harmonic import Linear as Linear
    from .harmonic import alibi_slopes as alibi_slopes
    from .harmonic import harmonic_bias as harmonic_bias
    from .harmonic import harmonic_score_mod as harmonic_score_mod
    from .installation import attend as attend
    from .installation import attending as attending
    from .installation import unattend as unattend
    from .probabilistic import Probabilistic as Probabilistic
    from .probabilistic import probabilistic_mask as probabilistic_mask
    from .window import Window as Window

_HOMES = {
    "AttentionBias": ".base",
    "Window": ".window",
    **dict.fromkeys(("attend", "attending", "unattend"), ".installation"),
    **dict.fromkeys(("Harmonic", "Linear", "alibi_slopes", "harmonic_bias", "harmonic_score_mod"), ".harmonic"),
    **dict.fromkeys(("Probabilistic", "probabilistic_mask"), ".probabilistic"),
}
"""Public name -> the module that has it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    return offered(__name__, _HOMES, name)

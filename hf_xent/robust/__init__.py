"""Floor 2: attacks on the inputs of classifiers, one file each, and the gradient ascent that all of them share.

found = attack(model, {"pixel_values": images}, labels, epsilon=8 / 255, method="pma", processor=processor)
robust_accuracy = (~found.flipped).float().mean()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .registered import ATTACKS
from .registered import get as get

if TYPE_CHECKING:  # loaded on first access: help texts that list the names need no torch
    from .ascent import ascend as ascend
    from .attacking import Attacked as Attacked
    from .attacking import attack as attack
    from .ball import Ball as Ball
    from .base import Attack as Attack
    from .gradient_masking import Masking as Masking
    from .gradient_masking import masking as masking

_HOMES = {
    "Attack": "base",
    "Attacked": "attacking",
    "Ball": "ball",
    "Masking": "gradient_masking",
    "ascend": "ascent",
    "attack": "attacking",
    "masking": "gradient_masking",
}
"""Public name -> the file that has it."""

__all__ = sorted(("ATTACKS", *ATTACKS.exported, *_HOMES, "get"))


def __getattr__(name: str) -> Any:
    return ATTACKS.attribute(name, _HOMES)

"""Floor 3: where a classifier finds its class: masks of images and rationales of texts, learned from labels alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..system.offered import offered

if TYPE_CHECKING:  # loaded on first access: torch takes a second
    from .landmark_plots import draw_landmarks as draw_landmarks
    from .landmark_plots import split_rings as split_rings
    from .localizer import Localizer as Localizer
    from .localizer import LocalizerConfig as LocalizerConfig
    from .maps import Localization as Localization
    from .maps import cam as cam
    from .maps import localize as localize
    from .plots import overlay as overlay
    from .plots import overlays as overlays
    from .suppression import background_activation as background_activation
    from .suppression import frozen_call as frozen_call
    from .suppression import mask_area as mask_area
    from .suppression import suppression_loss as suppression_loss

_HOMES = {
    **dict.fromkeys(("draw_landmarks", "split_rings"), ".landmark_plots"),
    **dict.fromkeys(("Localizer", "LocalizerConfig"), ".localizer"),
    **dict.fromkeys(("Localization", "cam", "localize"), ".maps"),
    **dict.fromkeys(("overlay", "overlays"), ".plots"),
    **dict.fromkeys(("background_activation", "frozen_call", "mask_area", "suppression_loss"), ".suppression"),
}
"""Public name -> the module that has it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    return offered(__name__, _HOMES, name)

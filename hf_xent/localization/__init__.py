"""Floor 3: where a classifier finds its class: masks of images and rationales of texts, learned from labels alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..system.offered import offered

if TYPE_CHECKING:  # loaded on first access: torch takes a second
    from .attributions import gradient_input as gradient_input
    from .attributions import last_attention as last_attention
    from .attributions import log_odds as log_odds
    from .attributions import occlusion as occlusion
    from .landmark_plots import draw_landmarks as draw_landmarks
    from .landmark_plots import split_rings as split_rings
    from .localizer import Localizer as Localizer
    from .localizer import LocalizerConfig as LocalizerConfig
    from .maps import Localization as Localization
    from .maps import cam as cam
    from .maps import localize as localize
    from .pages import TextRationale as TextRationale
    from .pages import explain as explain
    from .pages import rationale_html as rationale_html
    from .plots import overlay as overlay
    from .plots import overlays as overlays
    from .rationale import Rationale as Rationale
    from .rationale import RationaleConfig as RationaleConfig
    from .rationale import word_tokens as word_tokens
    from .rationale_scores import evidence_scores as evidence_scores
    from .rationale_scores import faithfulness as faithfulness
    from .suppression import background_activation as background_activation
    from .suppression import frozen_call as frozen_call
    from .suppression import mask_area as mask_area
    from .suppression import suppression_loss as suppression_loss

_HOMES = {
    **dict.fromkeys(("gradient_input", "last_attention", "log_odds", "occlusion"), ".attributions"),
    **dict.fromkeys(("evidence_scores", "faithfulness"), ".rationale_scores"),
    **dict.fromkeys(("draw_landmarks", "split_rings"), ".landmark_plots"),
    **dict.fromkeys(("Localizer", "LocalizerConfig"), ".localizer"),
    **dict.fromkeys(("Localization", "cam", "localize"), ".maps"),
    **dict.fromkeys(("overlay", "overlays"), ".plots"),
    **dict.fromkeys(("Rationale", "RationaleConfig", "word_tokens"), ".rationale"),
    **dict.fromkeys(("TextRationale", "explain", "rationale_html"), ".pages"),
    **dict.fromkeys(("background_activation", "frozen_call", "mask_area", "suppression_loss"), ".suppression"),
}
"""Public name -> the module that has it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    return offered(__name__, _HOMES, name)

"""Floor 3: models that adapt to what they are asked, without labels: streams, caches, prompts and single episodes.

Each works on features of a frozen model (`hf_xent.models.embeddings`), except `RMT`, which trains the model itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # loaded on first access: torch takes a second
    from ..models.embeddings import class_texts as class_texts
    from ..models.embeddings import features as features
    from ..models.embeddings import prototypes as prototypes
    from .maps import feature_maps as feature_maps
    from .repri import RePRI as RePRI
    from .tagger import TransductiveTagger as TransductiveTagger
    from .tagger import word_features as word_features

_HOMES = {
    **dict.fromkeys(("class_texts", "features", "prototypes"), "hf_xent.models.embeddings"),
    "RePRI": ".repri",
    **dict.fromkeys(("TransductiveTagger", "word_features"), ".tagger"),
    "feature_maps": ".maps",
    from .entropy import EntropyMinimization as EntropyMinimization
    from .rmt import RMT as RMT
    from .source import source_prototypes as source_prototypes
    from .views import ImageViews as ImageViews
    from .views import SoundViews as SoundViews
    from .views import TextViews as TextViews

_HOMES = {
    **dict.fromkeys(("class_texts", "features", "prototypes"), "hf_xent.models.embeddings"),
    "EntropyMinimization": "hf_xent.adapt.entropy",
    "RMT": "hf_xent.adapt.rmt",
    "source_prototypes": "hf_xent.adapt.source",
    **dict.fromkeys(("ImageViews", "SoundViews", "TextViews"), "hf_xent.adapt.views"),
    from .cache import TFUP as TFUP
    from .tfup_t import TFUPT as TFUPT
    from .tfup_t import TFUPTConfig as TFUPTConfig

_HOMES = {
    **dict.fromkeys(("class_texts", "features", "prototypes"), "hf_xent.models.embeddings"),
    "TFUP": ".cache",
    **dict.fromkeys(("TFUPT", "TFUPTConfig"), ".tfup_t"),
    from .negatives import NegativeLabels as NegativeLabels
    from .ood import ood_score as ood_score
    from .prompts import PromptOptions as PromptOptions
    from .prompts import PromptTuner as PromptTuner

_HOMES = {
    **dict.fromkeys(("class_texts", "features", "prototypes"), "hf_xent.models.embeddings"),
    "NegativeLabels": "hf_xent.adapt.negatives",
    "ood_score": "hf_xent.adapt.ood",
    **dict.fromkeys(("PromptOptions", "PromptTuner"), "hf_xent.adapt.prompts"),
}
"""Public name -> the module that has it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

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
    from .cache import TFUP as TFUP
    from .entropy import EntropyMinimization as EntropyMinimization
    from .maps import feature_maps as feature_maps
    from .repri import RePRI as RePRI
    from .rmt import RMT as RMT
    from .source import source_prototypes as source_prototypes
    from .tagger import TransductiveTagger as TransductiveTagger
    from .tagger import word_features as word_features
    from .tfup_t import TFUPT as TFUPT
    from .tfup_t import TFUPTConfig as TFUPTConfig
    from .views import ImageViews as ImageViews
    from .views import SoundViews as SoundViews
    from .views import TextViews as TextViews

_HOMES = {
    **dict.fromkeys(("class_texts", "features", "prototypes"), "hf_xent.models.embeddings"),
    "EntropyMinimization": "hf_xent.adapt.entropy",
    "RMT": "hf_xent.adapt.rmt",
    "source_prototypes": "hf_xent.adapt.source",
    **dict.fromkeys(("ImageViews", "SoundViews", "TextViews"), "hf_xent.adapt.views"),
    "RePRI": "hf_xent.adapt.repri",
    "feature_maps": "hf_xent.adapt.maps",
    **dict.fromkeys(("TransductiveTagger", "word_features"), "hf_xent.adapt.tagger"),
    "TFUP": "hf_xent.adapt.cache",
    **dict.fromkeys(("TFUPT", "TFUPTConfig"), "hf_xent.adapt.tfup_t"),
}
"""Public name -> the module that has it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

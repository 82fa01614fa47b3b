"""Floor 3: models that adapt to what they are asked, without labels: streams, caches, prompts and single episodes.

Each works on features of a frozen model (`hf_xent.models.embeddings`), except `RMT` and `EntropyMinimization`, which
train the model itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..system.offered import offered

if TYPE_CHECKING:  # loaded on first access: torch takes a second
    from ..models.embeddings import class_texts as class_texts
    from ..models.embeddings import features as features
    from ..models.embeddings import prototypes as prototypes
    from .cache import TFUP as TFUP
    from .entropy import EntropyMinimization as EntropyMinimization
    from .maps import feature_maps as feature_maps
    from .negatives import NegativeLabels as NegativeLabels
    from .ood import ood_score as ood_score
    from .prompts import PromptOptions as PromptOptions
    from .prompts import PromptTuner as PromptTuner
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
    "EntropyMinimization": ".entropy",
    "NegativeLabels": ".negatives",
    "RMT": ".rmt",
    "RePRI": ".repri",
    "TFUP": ".cache",
    "feature_maps": ".maps",
    "ood_score": ".ood",
    "source_prototypes": ".source",
    **dict.fromkeys(("ImageViews", "SoundViews", "TextViews"), ".views"),
    **dict.fromkeys(("PromptOptions", "PromptTuner"), ".prompts"),
    **dict.fromkeys(("TFUPT", "TFUPTConfig"), ".tfup_t"),
    **dict.fromkeys(("TransductiveTagger", "word_features"), ".tagger"),
}
"""Public name -> the module that has it."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    return offered(__name__, _HOMES, name)

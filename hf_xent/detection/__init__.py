"""Floor 3: scores of texts from the statistics of their tokens (was it trained on, is it generated?), and metrics.

values = detection.TextScorer(model, tokenizer, ("loss", "min_k_pp", "dc_pdd"))(texts)
detection.evaluate(values, labels, texts)         # AUROC with interval, TPR at an FPR, and those of a blind baseline
detection.calibrate("loss", values["loss"], labels)   # from a score to the probability of the positive class
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..system import renamed
from .scores import SCORES, get, sweep

if TYPE_CHECKING:  # loaded on first access: the names of the scores need no torch
    from .calibrated import CalibratedScore, calibrate
    from .counts import CountedText, frequencies
    from .evaluation import BLIND, blind, evaluate
    from .scorer import TextScorer, score
    from .scores import Score

__all__ = [
    "BLIND",
    "SCORES",
    "CalibratedScore",
    "CountedText",
    "Score",
    "TextScorer",
    "blind",
    "calibrate",
    "evaluate",
    "frequencies",
    "get",
    "score",
    "sweep",
]

_HOMES = {
    "Score": "scores",
    **dict.fromkeys(("CalibratedScore", "calibrate"), "calibrated"),
    **dict.fromkeys(("CountedText", "frequencies"), "counts"),
    **dict.fromkeys(("BLIND", "blind", "evaluate"), "evaluation"),
    **dict.fromkeys(("TextScorer", "score"), "scorer"),
}
"""Public name -> the file that has it."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _HOMES.values():
        return import_module(f".{name}", __name__)
    return renamed.attribute(__name__, name)

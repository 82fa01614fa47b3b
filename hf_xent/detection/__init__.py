"""Floor 3: scores of texts from the statistics of their tokens (was it trained on, is it generated?), and metrics.

found = detection.TextScorer(model, tokenizer, ("loss", "min_k_pp", "dc_pdd"))(texts)
detection.evaluate(found, labels, texts)          # AUROC with interval, TPR at an FPR, beside a blind baseline
"""

from .counts import Corpus, frequencies
from .evaluation import BLIND, blind, evaluate
from .scorer import TextScorer, score
from .scores import SCORES, Score, get, sweep

__all__ = [
    "BLIND",
    "SCORES",
    "Corpus",
    "Score",
    "TextScorer",
    "blind",
    "evaluate",
    "frequencies",
    "get",
    "score",
    "sweep",
]

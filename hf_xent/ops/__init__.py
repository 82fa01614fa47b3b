"""Floor 0: the vocabulary streamed once, every token's softmax reduced to a handful of floats. Needs torch alone."""

from .algebra import DIFFERENTIABLE, FORWARD_ONLY, STATISTICS, Head, State, Stats, merge
from .functional import Payload, map_logits, vocab_loss, vocab_stats

__all__ = [
    "DIFFERENTIABLE",
    "FORWARD_ONLY",
    "STATISTICS",
    "Head",
    "Payload",
    "State",
    "Stats",
    "map_logits",
    "merge",
    "vocab_loss",
    "vocab_stats",
]

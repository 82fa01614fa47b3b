"""Floor 0: the vocabulary streamed once, every token's softmax reduced to a handful of floats. Needs torch alone."""

from .algebra import DIFFERENTIABLE, FORWARD_ONLY, STATISTICS, Head, State, Stats, merge
from .functional import Payload, dense_stats, map_logits, vocab_loss, vocab_stats
from .shard import Shard

__all__ = [
    "DIFFERENTIABLE",
    "FORWARD_ONLY",
    "STATISTICS",
    "Head",
    "Payload",
    "Shard",
    "State",
    "Stats",
    "dense_stats",
    "map_logits",
    "merge",
    "vocab_loss",
    "vocab_stats",
]

"""Floor 0: streams the vocabulary once and reduces every token's softmax to a few numbers. Needs only torch."""

from . import operators  # noqa: F401  it registers them with torch
from .algebra import State, merge
from .functional import dense_stats, map_logits, vocab_loss, vocab_stats
from .head import Head, Payload
from .logprobs import token_logprobs
from .shard import Shard
from .statistics import DIFFERENTIABLE, FORWARD_ONLY, STATISTICS, Stats
from .transport import sinkhorn_divergence, with_positions

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
    "sinkhorn_divergence",
    "token_logprobs",
    "vocab_loss",
    "vocab_stats",
    "with_positions",
]

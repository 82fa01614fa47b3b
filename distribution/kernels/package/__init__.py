"""Cross-entropy of large-vocabulary language models without the logits, as a kernel of the Hub.

The rooms beside this file are those of the Python package hf_xent, as they are there: `ops` streams the vocabulary,
`losses` says what is computed from it. On a GPU with Triton its kernels run, elsewhere operations of torch.
"""

from . import layers, losses
from .losses import linear_cross_entropy
from .ops import Head, Stats, map_logits, token_logprobs, vocab_loss, vocab_stats

__all__ = [
    "Head",
    "Stats",
    "layers",
    "linear_cross_entropy",
    "losses",
    "map_logits",
    "token_logprobs",
    "vocab_loss",
    "vocab_stats",
]

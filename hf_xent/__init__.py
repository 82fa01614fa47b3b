"""Cross-entropy of large-vocabulary language models without the logits, and better losses in its place.

model = hf_xent.patch(model)                     # any AutoModelForCausalLM: same loss, no logits
model = hf_xent.patch(model, loss="emo")         # another loss: `hf-xent losses` lists them
loss = hf_xent.linear_cross_entropy(hidden, weight, labels)
stats = hf_xent.vocab_stats(hidden, hf_xent.Head(weight), labels)
scores = hf_xent.detection.score("min_k_pp", model, tokenizer, texts)
trainer = hf_xent.XentTrainer(model, hf_xent.XentConfig(output_dir="out"), train_dataset=dataset)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import losses, trainers
from .lazy import LazyLogits, Seam
from .losses import linear_cross_entropy
from .ops import Head, Stats, map_logits, vocab_loss, vocab_stats
from .patching import Comparison, compare, patch, seam_of, unpatch

if TYPE_CHECKING:
    from . import detection
    from .trainers import *  # noqa: F403  for type checkers; at run time they are loaded on first use

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "Head",
    "LazyLogits",
    "Seam",
    "Stats",
    "compare",
    "detection",
    "linear_cross_entropy",
    "losses",
    "map_logits",
    "patch",
    "seam_of",
    "unpatch",
    "vocab_loss",
    "vocab_stats",
    *trainers.__all__,
]


def __getattr__(name: str) -> Any:
    if name == "detection":  # as a module of its own it needs an import; scikit-learn takes a second
        return import_module(".detection", __name__)
    if name in trainers.__all__:  # imported on first use: transformers' Trainer takes seconds
        return getattr(trainers, name)
    raise AttributeError(f"module 'hf_xent' has no attribute {name!r}")

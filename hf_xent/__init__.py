"""Cross-entropy of large-vocabulary language models without the logits, and better losses in its place.

model = hf_xent.patch(model)                     # any language model of transformers: same loss, no logits
model = hf_xent.patch(model, loss="emo")         # another loss: `hf-xent losses` lists them
loss = hf_xent.linear_cross_entropy(hidden, weight, labels)
stats = hf_xent.vocab_stats(hidden, hf_xent.Head(weight), labels)
logp, entropy = hf_xent.token_logprobs(hidden, weight, labels, temperature=0.7)
scores = hf_xent.detection.score("min_k_pp", model, tokenizer, texts)
trainer = hf_xent.XentTrainer(model, hf_xent.XentConfig(output_dir="out"), train_dataset=dataset)
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .system import renamed

if TYPE_CHECKING:  # at run time a name is imported on first use: torch takes a second, trainers take more
    from . import detection, losses
    from .callbacks.patching import PatchCallback
    from .lazy import LazyLogits, Seam
    from .losses import linear_cross_entropy
    from .ops import Head, Stats, map_logits, token_logprobs, vocab_loss, vocab_stats
    from .patching import Comparison, compare, patch, seam_of, unpatch
    from .trainers.distillation import DistillationConfig, DistillationTrainer
    from .trainers.dxo import DXOConfig, DXOTrainer
    from .trainers.emo import EMOConfig, EMOTrainer
    from .trainers.f2c import F2CConfig, F2CTrainer
    from .trainers.ln_removal import LNRemovalCallback, LNRemovalConfig, LNRemovalTrainer
    from .trainers.noisefit import NoiseFiTConfig, NoiseFiTTrainer
    from .trainers.osp import OSPConfig, OSPTrainer
    from .trainers.spce import SPCEConfig, SPCETrainer
    from .trainers.spo import SPO, SPOConfig, SPOOptions, SPOTrainer
    from .trainers.xent import XentConfig, XentTrainer

__version__ = "0.2.0.dev0"

__all__ = [
    "SPO",
    "Comparison",
    "DXOConfig",
    "DXOTrainer",
    "DistillationConfig",
    "DistillationTrainer",
    "EMOConfig",
    "EMOTrainer",
    "F2CConfig",
    "F2CTrainer",
    "Head",
    "LNRemovalCallback",
    "LNRemovalConfig",
    "LNRemovalTrainer",
    "LazyLogits",
    "NoiseFiTConfig",
    "NoiseFiTTrainer",
    "OSPConfig",
    "OSPTrainer",
    "PatchCallback",
    "SPCEConfig",
    "SPCETrainer",
    "SPOConfig",
    "SPOOptions",
    "SPOTrainer",
    "Seam",
    "Stats",
    "XentConfig",
    "XentTrainer",
    "compare",
    "detection",
    "linear_cross_entropy",
    "losses",
    "map_logits",
    "patch",
    "seam_of",
    "token_logprobs",
    "unpatch",
    "vocab_loss",
    "vocab_stats",
]

_PACKAGES = {folder.name for folder in Path(__file__).parent.iterdir() if (folder / "__init__.py").exists()}
_PACKAGE_OF = {
    "LazyLogits": "lazy",
    "Seam": "lazy",
    "linear_cross_entropy": "losses",
    **dict.fromkeys(("Head", "Stats", "map_logits", "token_logprobs", "vocab_loss", "vocab_stats"), "ops"),
    **dict.fromkeys(("Comparison", "compare", "patch", "seam_of", "unpatch"), "patching"),
}
"""Public name -> the package that has it; all others are trainers."""

renamed.install(__name__)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    if name in __all__:
        return getattr(import_module(f".{_PACKAGE_OF.get(name, 'trainers')}", __name__), name)
    return renamed.attribute(__name__, name)

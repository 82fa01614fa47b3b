"""Floor 3: trainers, one file a method, one overridden method each."""

from .callback import PatchCallback
from .emo import EMOConfig, EMOTrainer
from .noisefit import NoiseFiTConfig, NoiseFiTTrainer
from .xent import XentConfig, XentTrainer

__all__ = [
    "EMOConfig",
    "EMOTrainer",
    "NoiseFiTConfig",
    "NoiseFiTTrainer",
    "PatchCallback",
    "XentConfig",
    "XentTrainer",
]

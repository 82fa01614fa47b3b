"""Floor 3: trainers, one file a method, one overridden method each."""

from .callback import PatchCallback
from .emo import EMOConfig, EMOTrainer
from .f2c import F2CConfig, F2CTrainer
from .noisefit import NoiseFiTConfig, NoiseFiTTrainer
from .xent import XentConfig, XentTrainer

__all__ = [
    "EMOConfig",
    "EMOTrainer",
    "F2CConfig",
    "F2CTrainer",
    "NoiseFiTConfig",
    "NoiseFiTTrainer",
    "PatchCallback",
    "XentConfig",
    "XentTrainer",
]

"""Floor 3: trainers, one file for each method, loaded on first access to one of its names: TRL's take seconds."""

from importlib import import_module
from typing import Any

from ..system import extras

METHODS = {
    "classes": ("ClassConfig", "ClassTrainer"),
    "distillation": ("DistillationConfig", "DistillationTrainer"),
    "dxo": ("DXOConfig", "DXOTrainer"),
    "eisl": ("EISLConfig", "EISLTrainer"),
    "emo": ("EMOConfig", "EMOTrainer"),
    "encoder_calibration": ("EncoderCalibrationConfig", "EncoderCalibrationTrainer"),
    "f2c": ("F2CConfig", "F2CTrainer"),
    "ln_removal": ("LNRemovalCallback", "LNRemovalConfig", "LNRemovalTrainer"),
    "noisefit": ("NoiseFiTConfig", "NoiseFiTTrainer"),
    "osp": ("OSPConfig", "OSPTrainer"),
    "self_distil_qa": ("AnswerMetrics", "SelfDistilQAConfig", "SelfDistilQATrainer"),
    "sft": ("StreamedSFTConfig", "StreamedSFTTrainer"),
    "siamese_ctc": ("SiameseCTCConfig", "SiameseCTCTrainer"),
    "spce": ("SPCEConfig", "SPCETrainer"),
    "spo": ("SPO", "SPOConfig", "SPOOptions", "SPOTrainer"),
    "xent": ("XentConfig", "XentTrainer"),
}
"""File -> the public names in it; a new trainer is registered here and nowhere else."""

_FILES = {name: f".{file}" for file, names in METHODS.items() for name in names}
_FILES |= {"PatchCallback": "..callbacks.patching", "stream_distillation": ".trl_distillation"}
__all__ = sorted(_FILES)


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extras.needed("train"):
        return getattr(import_module(_FILES[name], __name__), name)

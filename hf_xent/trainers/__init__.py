"""Floor 3: trainers, one file a method. A file is loaded when one of its names is asked for: TRL's take seconds."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..system import extras

if TYPE_CHECKING:
    from ..callbacks.patching import PatchCallback
    from .dxo import DXOConfig, DXOTrainer
    from .emo import EMOConfig, EMOTrainer
    from .f2c import F2CConfig, F2CTrainer
    from .ln_removal import LNRemovalCallback, LNRemovalConfig, LNRemovalTrainer
    from .noisefit import NoiseFiTConfig, NoiseFiTTrainer
    from .osp import OSPConfig, OSPTrainer
    from .spce import SPCEConfig, SPCETrainer
    from .spo import SPO, SPOConfig, SPOOptions, SPOTrainer
    from .xent import XentConfig, XentTrainer

METHODS = {
    "dxo": ("DXOConfig", "DXOTrainer"),
    "emo": ("EMOConfig", "EMOTrainer"),
    "f2c": ("F2CConfig", "F2CTrainer"),
    "ln_removal": ("LNRemovalCallback", "LNRemovalConfig", "LNRemovalTrainer"),
    "noisefit": ("NoiseFiTConfig", "NoiseFiTTrainer"),
    "osp": ("OSPConfig", "OSPTrainer"),
    "spce": ("SPCEConfig", "SPCETrainer"),
    "spo": ("SPO", "SPOConfig", "SPOOptions", "SPOTrainer"),
    "xent": ("XentConfig", "XentTrainer"),
}
"""File -> the names it offers; `hf_xent` offers them all."""

_FILES = {name: f".{file}" for file, names in METHODS.items() for name in names}
_FILES["PatchCallback"] = "..callbacks.patching"
__all__ = [  # checked against METHODS by the tests; type checkers read this list alone
    "SPO", "DXOConfig", "DXOTrainer", "EMOConfig", "EMOTrainer", "F2CConfig", "F2CTrainer", "LNRemovalCallback",
    "LNRemovalConfig", "LNRemovalTrainer", "NoiseFiTConfig", "NoiseFiTTrainer", "OSPConfig", "OSPTrainer",
    "PatchCallback", "SPCEConfig", "SPCETrainer", "SPOConfig", "SPOOptions", "SPOTrainer", "XentConfig", "XentTrainer",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extras.needed("train"):
        return getattr(import_module(_FILES[name], __name__), name)

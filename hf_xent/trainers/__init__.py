"""Floor 3: trainers, one file a method. A file is loaded when one of its names is asked for: TRL's take seconds."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import PatchCallback as PatchCallback
    from .dxo import DXOConfig as DXOConfig
    from .dxo import DXOTrainer as DXOTrainer
    from .emo import EMOConfig as EMOConfig
    from .emo import EMOTrainer as EMOTrainer
    from .f2c import F2CConfig as F2CConfig
    from .f2c import F2CTrainer as F2CTrainer
    from .ln_removal import LNRemovalCallback as LNRemovalCallback
    from .ln_removal import LNRemovalConfig as LNRemovalConfig
    from .ln_removal import LNRemovalTrainer as LNRemovalTrainer
    from .noisefit import NoiseFiTConfig as NoiseFiTConfig
    from .noisefit import NoiseFiTTrainer as NoiseFiTTrainer
    from .osp import OSPConfig as OSPConfig
    from .osp import OSPTrainer as OSPTrainer
    from .spce import SPCEConfig as SPCEConfig
    from .spce import SPCETrainer as SPCETrainer
    from .spo import SPO as SPO
    from .spo import SPOConfig as SPOConfig
    from .spo import SPOOptions as SPOOptions
    from .spo import SPOTrainer as SPOTrainer
    from .xent import XentConfig as XentConfig
    from .xent import XentTrainer as XentTrainer

METHODS = {
    "callback": ("PatchCallback",),
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

_FILES = {name: file for file, names in METHODS.items() for name in names}
__all__ = list(_FILES)


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_FILES[name]}", __name__), name)

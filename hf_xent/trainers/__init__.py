"""Floor 3: trainers, one file a method, one overridden method each."""

from .xent import XentConfig, XentTrainer

__all__ = ["XentConfig", "XentTrainer"]

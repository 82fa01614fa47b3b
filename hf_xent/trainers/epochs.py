"""A callback that says which epoch begins, and whether training resumes within it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class EpochCallback(TrainerCallback):
    """Calls `begin(epoch, resumed)` before an epoch's batches; `resumed` if training resumes within the epoch."""

    def __init__(self, begin: Callable[[int, bool], None]):
        self.begin = begin

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer, whose `state.epoch` is a whole number between epochs, and else a fraction."""
        epoch, part = divmod(state.epoch or 0.0, 1)
        self.begin(int(epoch), part > 0)

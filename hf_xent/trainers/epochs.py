"""A callback that says which epoch begins, and whether training resumes within it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class EpochCallback(TrainerCallback):
    """Calls `begin(epoch, resumed)` before an epoch's batches; `resumed` if training resumes within the epoch."""

    def __init__(self, begin: Callable[[int, bool], None]):
        self.begin = begin

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Called by the trainer."""
        steps = -(-len(train_dataloader) // args.gradient_accumulation_steps)
        self.begin(state.global_step // steps, state.global_step % steps > 0)

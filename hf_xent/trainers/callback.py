"""The patch as a callback, for scripts that own nothing but their trainer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..losses import Loss
from ..patching import patch, unpatch


class PatchCallback(TrainerCallback):
    """Patches the model of any `transformers.Trainer` (TRL's included) for as long as it trains; arguments as `patch`.

    trainer.add_callback(hf_xent.PatchCallback())
    """

    def __init__(self, loss: str | Loss | None = None, **options: Any):
        self.loss, self.options = loss, options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Patch the model. Raises: as `patch`."""
        patch(kwargs["model"], self.loss, **self.options)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was."""
        model: nn.Module = kwargs["model"]
        unpatch(model)

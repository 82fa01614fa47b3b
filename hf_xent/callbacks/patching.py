"""The patch as a callback, for scripts that have access to the trainer only."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..losses.base import Loss
from ..patching import patch_state, patched


class PatchCallback(TrainerCallback):
    """Patches the model of any `transformers.Trainer` (TRL's included) for as long as it trains.

        trainer.add_callback(hf_xent.PatchCallback())

    Warns at the end if no loss was computed without logits, and says why.

    Args:
        loss: Registry name or `hf_xent.losses.Loss`, as for `patch`; cross-entropy if it is left out.
        **options: As for `patch`.

    Raises:
        ValueError: When the training begins, what `patch` refuses.
    """

    def __init__(self, loss: str | Loss | None = None, **options: Any):
        self.loss, self.options = loss, options
        self._training = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Patch the model."""
        self._training.close()  # a training that failed did not call on_train_end
        self._training.enter_context(patched(kwargs["model"], self.loss, **self.options))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was."""
        reason = patch_state(kwargs["model"]).why_dense
        if reason:
            warnings.warn(f"PatchCallback had no effect: {reason}", stacklevel=2)
        self._training.close()

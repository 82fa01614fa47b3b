"""The model as it was when an epoch began, in evaluation mode: a teacher for the rest of the epoch.

Checkpoints within an epoch have its weights, in `epoch_teacher.safetensors`, so that a resumed run has the same one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from safetensors.torch import load_model, save_model
from torch import nn


class EpochTeacher:
    """Keeps a frozen copy of a model; it takes as much memory as the model's weights."""

    file = "epoch_teacher.safetensors"
    """Its name in a checkpoint."""
    model: Any = None
    """The copy; None before the first epoch."""

    def renew(self, model: nn.Module) -> None:
        """Takes the weights of a model, which is not wrapped, as they are now."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def save(self, checkpoint: str) -> None:
        """Writes the weights into the folder of a checkpoint."""
        if self.model is not None:
            save_model(self.model, str(Path(checkpoint) / self.file))

    def load(self, checkpoint: str, like: nn.Module) -> None:
        """Reads the weights from the folder of a checkpoint, if it has some, into a copy of a model of their shape."""
        path = Path(checkpoint) / self.file
        if path.is_file():
            self.renew(like)
            load_model(self.model, str(path))

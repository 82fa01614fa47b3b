"""The teacher of a student with adapters: the same model without them, so that a second one need not be loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ops import Payload
from .local import LocalTeacher


class UnadaptedTeacher(LocalTeacher):
    """The base model of a PEFT model.

    Args:
        model: A `peft.PeftModel`.

    Raises:
        ValueError: The model has no adapters that can be switched off.
    """

    def __init__(self, model: Any):
        if not hasattr(model, "disable_adapter"):
            raise ValueError(
                f"teacher is 'base', but the student is a {type(model).__name__} without adapters of PEFT: pass a"
                " peft_config, or another teacher"
            )
        super().__init__(model)

    def targets(self, batch: Mapping[str, Any]) -> Payload:
        """The base model's hidden states [B, T, D] and its head."""
        model: Any = self.model
        with model.disable_adapter():
            return super().targets(batch)

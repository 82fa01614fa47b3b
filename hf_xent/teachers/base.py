"""What every teacher is: something that answers a batch of the student's with targets for a distillation loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Teacher(Protocol):
    """Anything with this method: a model, a cache, a server, several of these."""

    def targets(self, batch: Mapping[str, Any]) -> Any:
        """What the teacher says about a batch.

        Args:
            batch: The student's inputs: `input_ids` [B, T], and whatever else the collator made (`attention_mask`,
                `position_ids` of packed rows, `labels`).

        Returns:
            Hidden states [B, T, D2] and their head, or another form of `hf_xent.losses.targets`; entry t is about the
            token after input t. Without gradient, on the device of the batch.
        """
        ...

"""Losses of tokens (`hf_xent.losses`) as losses of classes, under their own names and with their own options.

    loss(softmax(z), y)   as over a vocabulary, with K classes in its place

Those of a teacher take the detached logits of a second model or pass for the teacher's.

Source: that of the loss.
Relations: every loss that is a function of a token's statistics is here; EMO and EISL read embeddings and sequences,
and are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..losses import Loss
from ..ops import Head
from .base import ClassLoss


@dataclass(frozen=True)
class OfStatistics(ClassLoss):
    """A loss of tokens over classes; see the module's docstring."""

    loss: Loss
    """The loss of tokens."""

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a constant in the base, here it depends on the loss
        """The teacher's logits, if the loss has a teacher."""
        return ("second",) if self.loss.needs_teacher else ()

    def __call__(self, logits: Tensor, labels: Tensor, second: Tensor | None = None, **_: Any) -> Tensor:
        """The loss [N] of logits [N, K], labels [N] and, for a loss with a teacher, the teacher's logits [N, K]."""
        if not self.loss.needs_teacher:
            return self.loss.on_logits(logits, labels, reduction="none")
        identity = Head(torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device))
        return self.loss(logits, identity, labels, teacher=(second, identity), reduction="none")

    def reference(self, logits: Any, labels: Any, second: Any = None, **_: Any) -> np.ndarray:
        """That of the loss, which is written on dense logits."""
        z, y = torch.as_tensor(np.asarray(logits, np.float64)), torch.as_tensor(np.asarray(labels))
        teacher = {} if second is None else {"teacher": torch.as_tensor(np.asarray(second, np.float64))}
        return self.loss.reference(z, y, **teacher).numpy()

    def describe(self) -> dict[str, Any]:
        """Under the loss's own name."""
        return self.loss.describe()

"""Difference of two cross-entropies: texts that became likelier when a model was fine-tuned on the target.

    score = H_base(x) - H_tuned(x)          H mean negative log-probability of the tokens, nats

The losses are computed elsewhere, without logits: `hf_xent.experiments.selecting.losses_of` returns both.

Source: Moore, Lewis 2010, Intelligent Selection of Language Model Training Data, ACL (its H_I - H_N, negated).
Relations: The score `reference_gap` of `hf_xent.detection` is the same difference, read as evidence of membership.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import Each, Selector


@dataclass(frozen=True, eq=False)  # arrays have no single answer to ==
class Loss(Selector):
    """The texts whose loss falls most from the base model to the tuned one."""

    losses: Any = None
    """Two arrays [N], nats a token: of the model tuned on the target, and of the base model; NaN for no token."""

    def __post_init__(self) -> None:
        if self.losses is None:
            raise ValueError(
                "losses is None: pass losses=(tuned, base), the mean nats a token of every text under the model"
                " fine-tuned on the target and under the base model"
            )
        if len(self.losses) != 2:
            raise ValueError(f"losses has {len(self.losses)} parts: pass two arrays [N], losses=(tuned, base)")
        tuned, base = map(np.shape, self.losses)
        if tuned != base or len(tuned) != 1:
            raise ValueError(f"losses has the shapes {tuned} and {base}: pass two arrays [N], losses=(tuned, base)")

    def scores(self, texts: Sequence[str], target: Sequence[str], each: Each) -> np.ndarray:
        """The fall of the loss, nats a token [N]. Raises: ValueError for another number of losses than of texts."""
        tuned, base = (np.asarray(values, dtype=np.float64) for values in self.losses)
        if len(tuned) != len(texts):
            raise ValueError(f"losses has {len(tuned)} values, but there are {len(texts)} texts: pass one for each")
        return base - tuned

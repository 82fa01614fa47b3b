"""Another loss in the place of the cross-entropies that a model computes of its logits, while the model is called.

The model keeps its own target: whether labels are shifted, which index is ignored, what is reduced is its business.
Outside of the model's calls, `F.cross_entropy` of its logits is cross-entropy.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

import torch

from ..losses.base import Loss
from ..losses.cross_entropy import CrossEntropy
from ..losses.sequence import SequenceLoss
from .state import PatchState
from .tensor import LazyLogits
from .values import LazyTensor


@dataclass(eq=False)
class Objective:
    """A loss for the logits of one patched model in one of its calls."""

    loss: Loss
    state: PatchState
    used: bool = False  # whether it took the place of a cross-entropy


OBJECTIVE: ContextVar[Objective | None] = ContextVar("OBJECTIVE", default=None)
"""That of the innermost call of a patched model in this thread."""


def loss_of(x: LazyLogits, plain: CrossEntropy) -> tuple[Loss, torch.Size]:
    """The loss that stands for the cross-entropy `plain` of logits [N, V], and the shape that it needs their N rows in.

    Raises:
        RuntimeError: An objective is set that does not smooth labels, as the model does, or that compares the positions
            of sequences, which the model has taken apart.
    """
    objective = x.state.traced_objective if torch.compiler.is_compiling() else OBJECTIVE.get()
    if objective is None or objective.state is not x.state:
        return plain, x.shape[:-1]
    if plain.label_smoothing:
        raise RuntimeError(
            f"the model smooths its labels (label_smoothing={plain.label_smoothing}), which {objective.loss!r} does"
            " not do: set it to 0 in the model's configuration"
        )
    shape = _rows_before_flattening(x)
    check_sequences(objective.loss, shape)
    objective.used = True
    return objective.loss, shape


def check_sequences(loss: Loss, rows: torch.Size) -> None:
    """Raises: RuntimeError for a loss that compares the positions of sequences, if rows are tokens from all of them."""
    if isinstance(loss, SequenceLoss) and len(rows) == 1:
        raise RuntimeError(
            f"{loss!r} compares the positions of a sequence, but the model takes tokens out of theirs before it scores"
            " them: choose a loss of single tokens"
        )


def _rows_before_flattening(x: LazyTensor) -> torch.Size:
    """The shape of the rows, sequences last, of which x is a view; that of x if it is none."""
    rows = x.shape[:-1].numel()
    while x.parent is not None and x.parent[0].shape[:-1].numel() == rows:
        x = x.parent[0]
    return x.shape[:-1]

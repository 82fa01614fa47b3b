"""Weights of labels on their way to the loss: a model's own forward takes none, so the call of the model carries them.

A patched model weighs its labels in `model(input_ids, labels=labels, token_weights=weights)`, by constants w >= 0 in
their shape, which are shifted as they are:

    loss = sum_t w_t loss_t / sum_t w_t          or sum_t w_t loss_t / num_items_in_batch, if the caller passes that

So a weight of 0 is the label -100, and without num_items_in_batch the scale of the weights has no effect. Whatever
computes the loss from lazy logits asks here for the weights of its targets, which are the labels themselves or the
labels shifted by one; both are tried.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .state import PatchState, next_token_labels

NAME = "token_weights"


@dataclass(eq=False)
class TokenWeights:
    """The weights that a call of a patched model was given."""

    values: Tensor  # [B, T], in the shape of labels
    labels: Tensor  # [B, T], the model's own
    shifted: Tensor | None  # [B, T], aligned with the logits, if the caller passed them too
    state: PatchState  # of the model that was called
    used: bool = False  # whether a loss has asked for them

    def of(self, targets: Tensor, ignore_index: int) -> Tensor:
        """The weights of a loss's targets, in their shape. Raises: ValueError if these are not the call's labels."""
        labels, weights = self.labels.to(targets.device), self.values.to(targets.device)
        last = F.pad(weights, (0, 1))[..., 1:]
        pairs = [(next_token_labels(labels, ignore_index), last), (labels[..., 1:], weights[..., 1:])]
        pairs += [(labels, weights)] if self.shifted is None else [(self.shifted.to(targets.device), last)]
        for candidate, found in pairs:
            if candidate.numel() == targets.numel() and torch.equal(candidate.reshape(targets.shape), targets):
                self.used = True
                return found.reshape(targets.shape)
        raise ValueError(
            f"{NAME} has shape {tuple(self.values.shape)}, but the model's loss is of {targets.numel()} other labels"
            " than it was given: call the model with always=True and without labels, and weigh the loss of out.logits"
        )


CURRENT: ContextVar[TokenWeights | None] = ContextVar("CURRENT", default=None)  # of the innermost call of this thread


def weigh(state: PatchState, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """The targets of a loss over a model's lazy logits and their weights, None if the call was given none.

    A target of weight 0 is ignored, as one without a label is: it takes no time, and statistics do not count it.
    """
    current = None if torch.compiler.is_compiling() else CURRENT.get()  # a compiled call refuses weights
    if current is None or current.state is not state:
        return targets, None
    weights = current.of(targets, ignore_index)
    return torch.where(weights == 0, ignore_index, targets), weights


def check_weights(weights: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Weights in float32 or float64. Raises: ValueError for another shape than labels have, or a value out of range."""
    if not isinstance(weights, Tensor) or weights.shape != shape:
        found = f"shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else f"type {type(weights).__name__}"
        raise ValueError(f"{NAME} has {found} but labels have shape {tuple(shape)}: pass one per label, a tensor")
    weights = weights.detach()
    weights = weights if weights.dtype == torch.float64 else weights.float()
    wrong = weights[~((weights >= 0) & (weights < float("inf")))]  # NaN fails both
    if wrong.numel():
        raise ValueError(f"{NAME} has {float(wrong[0])}: pass finite weights >= 0, of which 0 ignores a label")
    return weights

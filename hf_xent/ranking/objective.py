"""A ranking loss with its state, kept in buffers that change in training alone."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ..ops.statistics import wide
from .base import RankingLoss


class Objective(nn.Module):
    """A loss over `rows` training rows; its state is in `state_dict`, float32.

    objective = Objective(ranking.get("tpauc_kl"), rows=len(dataset))
    loss = objective(logits, labels, index)            # all [B]; index: the rows' numbers in the training set

    The state changes only in training mode with gradients enabled. A row that is twice in a batch gets the mean of its
    new states.

    Args:
        loss: A ranking loss, as `hf_xent.ranking.get` returns it.
        rows: The number of training rows.
    """

    def __init__(self, loss: RankingLoss, rows: int):
        super().__init__()
        self.loss = loss
        for name, value in loss.state(rows).items():
            self.register_buffer(name, value)

    def forward(
        self,
        logits: Tensor,  # [B]
        labels: Tensor,  # [B], 1 or 0
        index: Tensor | None = None,  # [B]; None if the loss has no state for each row
    ) -> Tensor:
        """The loss of a batch; if a class is missing, a zero that is connected to the logits, with a warning.

        Args:
            logits: The logits of label 1 [B].
            labels: 1 or 0 [B].
            index: The rows' numbers in the training set [B]; None if the loss has no state for each row.

        Returns:
            The loss, a scalar.

        Raises:
            ValueError: Shapes differ, an index is needed, or it is not of integers.
        """
        if labels.shape != logits.shape or (index is not None and index.shape != logits.shape):
            shapes = ", ".join(str(tuple(x.shape)) for x in (logits, labels, index) if x is not None)
            raise ValueError(f"logits, labels and index have the shapes {shapes}: pass one number per row of the batch")
        if index is not None and (index.is_floating_point() or index.dtype == torch.bool):
            raise ValueError(f"index is {index.dtype}: pass the rows' numbers as integers")
        scores = self.loss.scores(logits.to(wide(logits.dtype)))
        positive = labels > 0.5
        pos, neg = scores[positive], scores[~positive]
        if self.loss.both and not (len(pos) and len(neg)):
            warnings.warn(
                f"a batch has {len(pos)} positives and {len(neg)} negatives, so its loss is 0: use a DualSampler",
                stacklevel=2,
            )
            return scores[:0].sum()  # not scores.sum() * 0, which infinite logits make nan
        buffers = dict(self.named_buffers())
        if index is None and any(buffer.ndim for buffer in buffers.values()):
            raise ValueError("index is None but the loss has a state for each row: pass the rows' numbers [B]")
        rows = None if index is None else index[positive].long()  # uint8 would be a mask
        loss, new_state = self.loss.step(pos, neg, {name: x[rows] if x.ndim else x for name, x in buffers.items()})
        if self.training and torch.is_grad_enabled():
            for name, buffer in buffers.items():
                value = new_state[name].detach().to(buffer)
                if rows is None or not buffer.ndim:
                    buffer.copy_(value)
                else:
                    buffer.scatter_reduce_(0, rows, value, "mean", include_self=False)
        return loss

    def extra_repr(self) -> str:
        """The loss and its options."""
        return repr(self.loss)

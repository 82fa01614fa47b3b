"""Sequences that are split over ranks: accelerate's context parallelism (`cp_size`) and Ulysses (`sp_size`).

    args = XentConfig(..., parallelism_config=ParallelismConfig(cp_size=2))                            # with FSDP2
    args = XentConfig(..., parallelism_config=ParallelismConfig(sp_size=2, sp_backend="deepspeed"))    # with DeepSpeed

Labels are shifted before they are split (by transformers, and by DeepSpeed's loader, whose collator has to make
`position_ids`), and loss and gradients are those of one rank: of the sum over the tokens of all ranks and accumulated
batches by their number. transformers itself has that for `cp_size`. Under `sp_size` it takes the mean of each batch, so
that the batches of a step weigh alike however many labels they have, and its gradients are `sp_size` times as large:
the backward of its gather adds up the ranks, and DeepSpeed does so again. Logged means are over all ranks' tokens.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..losses.base import Loss
from ..losses.sequence import SequenceLoss
from .base import Mixin


class SplitSequences(Mixin):
    """Goes before `transformers.Trainer` in a class's bases.

    Raises:
        ValueError: Sequences are split, but the loss is computed by `compute_loss_func`, or compares positions or
            passes of whole sequences.
    """

    objective: Loss
    splits_sequences = True
    """Whether the loss is a sum over tokens, so that a rank can compute its part from a part of a sequence."""
    _counts_tokens = False  # whether the loss is divided by the number of tokens of all ranks, as Trainer would not

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = getattr(self.accelerator, "parallelism_config", None)
        if config is None or not (config.cp_enabled or getattr(config, "sp_enabled", False)):  # newer than cp_enabled
            return
        size = f"cp_size={config.cp_size}" if config.cp_enabled else f"sp_size={config.sp_size}"
        if self.compute_loss_func is not None:
            raise ValueError(
                f"compute_loss_func is given and parallelism_config has {size}: it would get labels that are not"
                " shifted, of a part of the sequence; pass a loss instead"
            )
        whole = isinstance(self.objective, SequenceLoss)
        if whole or not self.splits_sequences:
            needs = repr(self.objective) if whole else type(self).__name__
            raise ValueError(
                f"parallelism_config has {size}, but {needs} compares positions or passes of whole sequences: leave it"
                " 1, or use hf_xent.XentTrainer with another loss"
            )
        forward = inspect.signature(self.accelerator.unwrap_model(self.model).forward).parameters.values()
        if not config.cp_enabled and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in forward):
            self._counts_tokens = self.loss_is_scaled_for_ga = True

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`; where Ulysses splits sequences, the labels of all ranks are counted."""
        samples, count = super().get_batch_samples(*args, **kwargs)
        if self._counts_tokens and samples:
            device = self.accelerator.device
            local = sum((batch["shift_labels"] != -100).sum().to(device) for batch in samples)
            count = self.accelerator.gather(torch.as_tensor(local, device=device)).sum()
        return samples, count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """As `Trainer`; where Ulysses splits sequences, over the tokens of all ranks and accumulated batches."""
        if not (self._counts_tokens and model.training and num_items_in_batch is not None):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["shift_labels"].contiguous()  # a part of longer rows; transformers' loss takes a view of it
        count = num_items_in_batch.clamp(min=1)
        outputs = model(**{**inputs, "labels": labels, "shift_labels": labels, "num_items_in_batch": count})
        ranks, split = self.accelerator.num_processes, self.accelerator.parallelism_config.sp_size
        # losses are averaged over all ranks for the log; gradients are added over the ranks of a sequence, and averaged
        # over the others
        loss = outputs.loss * (ranks // split) + outputs.loss.detach() * (ranks - ranks // split)
        return (loss, outputs) if return_outputs else loss

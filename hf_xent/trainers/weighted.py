"""A trainer whose loss weighs labels by columns of the data set; `hf_xent.trainers.weights` has the formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .base import Mixin
from .batches import shifts_labels
from .weights import COLUMNS, TOKENS, WithWeights


class Weighted(Mixin):
    """Goes first in the bases of a trainer whose model computes the loss; see the module's docstring."""

    weighs_labels = True
    data_collator: Any
    _signature_columns: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.data_collator = WithWeights(self.data_collator)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock trainer; labels of virtual tokens, which prompt tuning puts first, have the weight 0."""
        if TOKENS in inputs and self._virtual_tokens:
            inputs = {**inputs, TOKENS: F.pad(inputs[TOKENS], (self._virtual_tokens, 0))}
        return super().compute_loss(model, inputs, *args, **kwargs)

    @property
    def _virtual_tokens(self) -> int:
        """How many labels prompt tuning puts before those of a row."""
        prompt: Any = getattr(self.model, "active_peft_config", None)
        if not getattr(prompt, "is_prompt_learning", False) or prompt.peft_type == "PREFIX_TUNING":
            return 0
        return int(prompt.num_virtual_tokens)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *COLUMNS]))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The sum of weights in place of the number of labels, if a batch has weights."""
        if not any(TOKENS in batch for batch in batch_samples):
            return super()._get_num_items_in_batch(batch_samples, device)
        if self.args.n_gpu > 1 and not self.args.average_tokens_across_devices:
            raise ValueError(
                f"average_tokens_across_devices is False, but {TOKENS} are divided by their sum over all devices: leave"
                " it True"
            )
        counted = [{**batch, "shift_labels": _Mass(self._weights_of(batch))} for batch in batch_samples]
        total = super()._get_num_items_in_batch(counted, device)
        return total if total is None else torch.where(total == 0, 1, total)

    def _weights_of(self, batch: Mapping[str, Any]) -> Tensor:
        """The weights of the labels that a batch has targets for, [...]; 1 where a batch has no weights."""
        labels = batch["labels"] if batch.get("labels") is not None else batch["shift_labels"]
        weights = torch.where(labels == -100, 0.0, batch.get(TOKENS, torch.ones((), device=labels.device)))
        first_is_predicted = not shifts_labels(self.model) or "labels" not in batch or self._virtual_tokens > 0
        return weights if first_is_predicted else weights[..., 1:]


@dataclass(frozen=True)
class _Mass:
    """Weights that stand in for labels where a trainer counts those that are not ignored."""

    weights: Tensor

    def ne(self, ignore_index: int) -> Tensor:
        """What the trainer sums."""
        return self.weights

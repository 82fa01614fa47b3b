"""A teacher that runs here: any causal LM, of any hidden size, of which only hidden states and head are taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..lazy import LazyLogits
from ..models.contexts import eval_mode
from ..ops import Head, Payload
from ..patching import ensure_patched, inner_of, lazily, patch_state
from ..patching.calls import parameters_of

SEQUENCES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What attention kernels are told of packed rows; models pass it on as further keywords."""


class LocalTeacher:
    """A causal LM that answers with its last hidden states and its head; its logits are never computed.

    Args:
        model: A transformers model with a language-modeling head, also inside wrappers, and also quantized or sharded.
            It is patched. It keeps its mode, but answers in evaluation mode and without gradient, so it may also be the
            student.

    Raises:
        ValueError: The model has no linear head.
    """

    def __init__(self, model: nn.Module):
        self.model = ensure_patched(model)

    @property
    def name(self) -> str:
        """The path or Hub id that the model was loaded from, or its class."""
        inner = inner_of(self.model)
        return getattr(inner.config, "_name_or_path", "") or type(inner).__name__

    def targets(self, batch: Mapping[str, Any]) -> Payload:
        """The model's hidden states [B, T, D2] and its head.

        Args:
            batch: The student's inputs. What the model does not take is left out, labels too.

        Raises:
            RuntimeError: The model computed its logits at once; the message says why.
        """
        device = batch["input_ids"].device
        with torch.no_grad(), eval_mode(self.model), lazily(self.model):
            logits = self.model(**self._inputs(batch), use_cache=False).logits
            if not isinstance(logits, LazyLogits) or logits.is_dense:
                raise RuntimeError(
                    f"the teacher {self.name} computed its logits at once: {patch_state(self.model).why_dense}"
                )
            hidden, head = logits.with_head(lambda hidden, head: hidden), logits.head
        return hidden.to(device), moved(head, device)

    def _inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        model: Any = inner_of(self.model)
        model_class: Any = type(model)
        names = parameters_of(model_class)
        taken = {*names, *(SEQUENCES if "kwargs" in names else ())} - {"labels", "shift_labels", "use_cache"}
        device = next((p.device for p in model.parameters() if not p.is_meta), batch["input_ids"].device)
        inputs = {name: x for name, x in batch.items() if name in taken}
        return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def moved(head: Head, device: torch.device) -> Head:
    """The head on a device; itself if it is there."""
    if head.weight.device == device or not isinstance(head.weight, Tensor):
        return head
    return head.with_tensors(*(None if x is None else x.to(device) for x in head.tensors.values()))

"""The inputs of a loss in a training step: the labels of a batch, and the hidden states of a model's lazy logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import ForMaskedLMLoss

from ..lazy import LazyLogits, TracedLogits, next_token_labels
from ..ops.rows import token_ids
from ..patching import inner_of
from ..patching.calls import objective_of


def refuse_unlabeled(inputs: Mapping[str, Any]) -> None:
    """Raises: ValueError for a batch that has no labels."""
    if inputs.get("labels") is None and inputs.get("shift_labels") is None:
        raise ValueError(f"a batch has {', '.join(inputs)} but no labels: use a language-modeling data collator")


def shifts_labels(model: nn.Module) -> bool:
    """Whether position t of a model predicts label t + 1: not in an encoder-decoder, nor in a masked language model.

    transformers' trainer decides by the name of a loss, which models such as GPT-2 do not have.
    """
    inner: Any = inner_of(model)
    if (objective := objective_of(inner)) is not None:  # in place of the model's own loss function
        return objective.next_token and not getattr(inner.config, "is_encoder_decoder", False)
    encoder_decoder = getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
    return not encoder_decoder and getattr(inner, "loss_function", None) is not ForMaskedLMLoss


def targets(inputs: Mapping[str, Any]) -> Tensor:
    """The token that each position of a batch has to predict, or -100. Raises: ValueError if it has no labels."""
    refuse_unlabeled(inputs)
    labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
    return next_token_labels(labels) if shifted is None else token_ids(shifted)  # type: ignore[arg-type]


def lazy(logits: Any, length: int, method: str) -> LazyLogits:
    """The lazy logits of the last `length` positions, from which `method` (its name) reads the hidden states.

    Positions of virtual tokens, which prompt tuning puts before a sequence, are left out. Raises: ValueError for logits
    that are already computed.
    """
    if isinstance(logits, TracedLogits):  # of a compiled model
        logits = logits.lazy()
    if not isinstance(logits, LazyLogits) or logits.is_dense:
        raise ValueError(
            f"the logits are a {type(logits).__name__} that is already computed, but {method} reads the hidden states"
            " of lazy logits: train without an adapter that multiplies by the head itself, and see hf-xent check"
        )
    last: Any = logits[:, -length:] if logits.shape[1] > length else logits
    return last

"""Labels of a sequence that is split over ranks: whether they were shifted can only be known before the split.

The last token of a rank's part has its target on the next rank, so labels are shifted first, and split then:

    shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    targets = shift_labels[:, part].contiguous()
    out = model(input_ids=ids[:, part], position_ids=positions[:, part], labels=targets, shift_labels=targets,
                num_items_in_batch=(shift_labels != -100).sum())

Each rank's loss is then its part of the mean over all tokens: their sum is the loss. A model cannot see how its inputs
were split, but it can see who splits them: torch's `context_parallel`, and Ulysses through accelerate.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn import functional as F


def refuse_unshifted(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raises: ValueError if a call has labels to be shifted by the model while its sequence is split over ranks."""
    if kwargs.get("shift_labels") is not None:
        return
    if splitter := what_splits(model):
        raise ValueError(
            f"labels is given without shift_labels, but {splitter} splits the sequence over ranks, so the target of a"
            " part's last token is on another rank: shift before the split, shift_labels = F.pad(labels, (0, 1),"
            " value=-100)[:, 1:], and pass each part of it as labels and as shift_labels"
        )


def what_splits(model: nn.Module) -> str:
    """What splits the sequences of a model's calls over ranks now; empty if nothing does."""
    # within the context, torch's own attention is replaced by a function of this module
    if getattr(F.scaled_dot_product_attention, "__module__", None) == CONTEXT_PARALLEL:
        return "torch's context_parallel"
    state: Any = sys.modules.get("accelerate.state")
    initialized = state is not None and state.is_initialized()
    config: Any = getattr(state.AcceleratorState(), "parallelism_config", None) if initialized else None
    if model.training and getattr(config, "sp_enabled", False):  # in evaluation it is off
        return f"accelerate's sequence parallelism (sp_size={config.sp_size})"
    return ""


CONTEXT_PARALLEL = "torch.distributed.tensor.experimental._context_parallel._attention"

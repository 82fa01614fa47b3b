"""One vector for each row, from what a model makes of all its positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..classes.heads import inputs_of
from ..ops.statistics import widened


def before_head(head: nn.Module, model: Any, batch: Mapping[str, Any]) -> Tensor:
    """What the head saw for each row; of a decoder, at the token whose logits are the model's."""
    with inputs_of(head) as seen:
        logits = model(**batch).logits
    if logits.ndim != 2:
        raise ValueError(f"model is a {type(model).__name__} with logits {tuple(logits.shape)}: pass one of whole rows")
    found, ids = seen[-1], batch.get("input_ids")
    if found.ndim != 3 or ids is None or found.shape[:2] != ids.shape:
        return found
    return at_last_token(found, ids, model.config.get_text_config().pad_token_id)


def at_last_token(states: Tensor, ids: Tensor, pad: int | None) -> Tensor:
    """States [B, T, D] at the last token of ids [B, T] that is not padding: [B, D].

    Padding is found by its id, as transformers finds it, also if there is a mask.
    """
    steps = torch.arange(ids.shape[1], device=ids.device)
    last = steps[-1:] if pad is None else (steps * (ids != pad)).argmax(-1)
    return states[torch.arange(len(ids), device=ids.device), last.to(states.device)]


def mean_state(output: Any, batch: Mapping[str, Any], model: Any) -> Tensor:
    """The mean of an encoder's last hidden states, without padding. Raises: ValueError if it has none."""
    states = getattr(output, "last_hidden_state", None)
    if states is None or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"model is a {type(model).__name__}, which is neither an encoder nor a classifier of rows: pass one"
        )
    states = widened(states)
    if states.ndim == 4:  # [B, C, H, W]
        return states.mean((-2, -1))
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == states.shape[:2]:
        weights = mask.unsqueeze(-1).to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
    if mask is not None and not mask.all():
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)} and of other steps than the states, {tuple(states.shape)}: pass"
            " rows of one length at a time"
        )
    return states.mean(1)

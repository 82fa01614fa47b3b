"""A batch whose decoder gets the model's own predictions as inputs: scheduled sampling in two passes.

Output t predicts target t (label t of an encoder-decoder, label t + 1 of a causal LM), and target t - 1 is input t. So

    x'_t = argmax_v p(v | x_{<t}, source)      p of output t - 1, where target t - 1 is a label and another one follows

in a first pass over the targets as inputs, in evaluation mode, without a gradient and without logits.

Source: Mihaylova and Martins 2019, Scheduled Sampling for Transformers, arXiv:1906.07651.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.contexts import eval_mode
from ..patching import inner_of, lazily
from .batches import lazy, targets
from .weights import TOKENS


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model's labels are another sequence than its inputs."""
    return bool(getattr(getattr(inner_of(model), "config", None), "is_encoder_decoder", False))


def replaced(model: nn.Module, inputs: dict[str, Any], share: float, key: str) -> tuple[dict[str, Any], Tensor, Tensor]:
    """A batch with a share of its decoder's inputs replaced by the model's predictions; the labels are the same.

    Args:
        model: A patched language model, also inside wrappers.
        inputs: A batch with labels [B, T]: `decoder_input_ids` are made of them if they are missing; a causal LM has
            `input_ids`.
        share: The probability of an input that is made of a label to be replaced.
        key: With the labels of a row, what the row's draws depend on; neither padding nor other rows do.

    Returns:
        The batch; how many inputs are now another token, and how many could have been, [] each.

    Raises:
        ValueError: The decoder has embeddings as inputs, or a model that cannot make its inputs of labels.
    """
    name, ids = _decoder_inputs(model, inputs)
    wanted = inputs["labels"] if name.startswith("decoder") else targets(inputs)
    hidden_from_first = {TOKENS, "labels", "shift_labels"}
    first = {x: value for x, value in inputs.items() if x not in hidden_from_first} | {name: ids}
    with torch.no_grad(), eval_mode(model), lazily(model):
        own = lazy(model(**first).logits, ids.shape[1], "own_inputs").argmax(-1)
    open_ = _open(wanted)
    chosen = open_ if share == 1 else open_ & _drawn(open_, wanted, share, key)
    mixed = torch.where(chosen, F.pad(own.to(ids.device), (1, -1)), ids)
    return {**inputs, name: mixed}, (mixed != ids).sum(), open_.sum()


def _decoder_inputs(model: nn.Module, inputs: dict[str, Any]) -> tuple[str, Tensor]:
    """The name of the decoder's inputs, and their tokens [B, T]."""
    inner: Any = inner_of(model)
    name = "decoder_input_ids" if is_encoder_decoder(model) else "input_ids"
    if inputs.get(name) is not None:
        return name, inputs[name]
    if name == "input_ids" or inputs.get("decoder_inputs_embeds") is not None:
        raise ValueError(f"a batch has {', '.join(inputs)} but no {name}, which own_inputs replaces: set it to 0")
    if not hasattr(inner, "prepare_decoder_input_ids_from_labels"):
        raise ValueError(
            f"model is a {type(inner).__name__}, which does not make decoder_input_ids of labels: let the data collator"
            " make them"
        )
    return name, inner.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])


def _open(wanted: Tensor) -> Tensor:
    """True at inputs that are made of a target, if one more target follows, [B, T]."""
    present = wanted != -100
    follows = present.flip(-1).cumsum(-1).flip(-1) > 0
    return F.pad(present, (1, -1)) & follows


def _drawn(open_: Tensor, wanted: Tensor, share: float, key: str) -> Tensor:
    """Draws at these inputs, one after the other in each row."""
    drawn = torch.zeros_like(open_)
    for row, places, tokens in zip(drawn, open_, wanted, strict=True):
        random = Random(f"{key}: {tokens[tokens != -100].tolist()}")  # of text, the same on every machine
        draws = [random.random() < share for _ in range(int(places.sum()))]
        row[places] = torch.tensor(draws, dtype=torch.bool, device=row.device)
    return drawn

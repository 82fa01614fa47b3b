"""Refusals of options that a trainer cannot honor: by name, when the trainer is made, not after hours of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..patching.heads import inner_of

NO_MODEL_INIT = "the model is patched once, when the trainer is made: pass model instead"
OWN_LOSS = "the trainer computes its own loss: use XentTrainer, or the method's own options"


def refuse_options(args: Any, reasons: Mapping[str, str]) -> None:
    """Raises: ValueError for the first field of a configuration that has a reason and is not at its default."""
    for name, reason in reasons.items():
        value = getattr(args, name)
        if value != getattr(type(args), name):  # a dataclass keeps defaults as attributes of the class
            raise ValueError(f"{name} is {value!r}, but {reason}")


def refuse_arguments(arguments: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Raises: ValueError for the first keyword that has a reason and a value."""
    for name, reason in reasons.items():
        if arguments.get(name) is not None:
            raise ValueError(f"{name} is given, but {reason}")


def refuse_encoder_decoder(model: Any) -> None:
    """Raises: ValueError for an encoder-decoder, whose labels are another sequence than its inputs, or for no model."""
    inner: Any = inner_of(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model is a {type(inner).__name__}, an encoder and a decoder, but this trainer reads inputs and labels as"
            " one sequence: use XentTrainer"
        )

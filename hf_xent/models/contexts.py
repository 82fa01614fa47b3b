"""A model's mode for a while, and its length: what looks at a model leaves it as it was, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..system import renamed


def positions(model: Any) -> int | None:
    """How many tokens a model that looks its positions up has room for; None for one that computes them (rotary)."""
    told = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # ALiBi and recurrent models: none
    if not isinstance(told, int):
        return None
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    # OPT's table has two more rows than positions; RoBERTa's positions begin after its padding's
    tables = [e for e in embeddings if told <= e.num_embeddings <= told + 2 and e is not model.get_input_embeddings()]
    return min((told if e.padding_idx is None else told - e.padding_idx - 1 for e in tables), default=None)


def check_room(model: Any, tokens: int, name: str) -> None:
    """Refuse sequences that are longer than a model has positions for. Raises: ValueError, which names the option."""
    if (room := positions(model)) is not None and tokens > room:
        raise ValueError(f"{name} is {tokens}, but the model has {room} positions: choose at most {room}")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """In here a model is in evaluation mode, without dropout; gradients are as they were, see `torch.no_grad`."""
    modes = [(module, module.training) for module in model.modules()]  # parts may be in another mode than the whole
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eval_mode_without_autocast(model: Any) -> Iterator[None]:
    """As `eval_mode`, and without the autocast that accelerate puts around a model's forward for a trainer's bf16."""
    attributes = model.__dict__
    forward = attributes.get("forward")
    original = attributes.get("_original_forward")  # where accelerate keeps what it wrapped
    if original is not None:
        model.forward = original
    try:
        with eval_mode(model):
            yield
    finally:
        if original is not None:
            model.forward = forward


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)

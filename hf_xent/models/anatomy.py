"""What a Hugging Face model is made of, whatever its class: its layers, its positions, and tokens to run it on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def positions(model: Any) -> int | None:
    """How many tokens a model that looks its positions up has room for; None for one that computes them (rotary)."""
    size = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # ALiBi and recurrent models: none
    if not isinstance(size, int):
        return None
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    # OPT's table has two more rows than positions; RoBERTa's positions begin after its padding's
    tables = [e for e in embeddings if size <= e.num_embeddings <= size + 2 and e is not model.get_input_embeddings()]
    return min((size if e.padding_idx is None else size - e.padding_idx - 1 for e in tables), default=None)


def check_room(model: Any, tokens: int, name: str) -> None:
    """Refuse sequences that are longer than a model has positions for. Raises: ValueError, which names the option."""
    if (room := positions(model)) is not None and tokens > room:
        raise ValueError(f"{name} is {tokens}, but the model has {room} positions: choose at most {room}")


def random_tokens(model: nn.Module, rows: int, length: int) -> Tensor:
    """Token ids [rows, length], the same every time, on the device of the embeddings."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]  # every transformers model has it
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(embeddings.weight.shape[0], 2**15), (rows, length), generator=generator)
    return ids.to(embeddings.weight.device)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a model: the first list of modules as long as its configuration says.

    Raises: ValueError if there is none.
    """
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of {count} layers: its layers cannot be found")
    return list(lists[0])

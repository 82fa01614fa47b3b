"""The parts of a Hugging Face model of any class: its layers and positions, and tokens to run it on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def positions(model: Any) -> int | None:
    """The number of learned positions of a model; None if it computes positions instead (rotary)."""
    size = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # ALiBi and recurrent models: none
    if not isinstance(size, int):
        return None
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    # OPT's table has two more rows than positions; RoBERTa's positions begin after its padding's
    tables = [e for e in embeddings if size <= e.num_embeddings <= size + 2 and e is not model.get_input_embeddings()]
    return min((size if e.padding_idx is None else size - e.padding_idx - 1 for e in tables), default=None)


def check_room(model: Any, tokens: int, name: str) -> None:
    """Check that a model has positions for sequences of `tokens`. Raises: ValueError, which names the option."""
    if (limit := positions(model)) is not None and tokens > limit:
        raise ValueError(f"{name} is {tokens}, but the model has {limit} positions: choose at most {limit}")


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
        raise ValueError(
            f"model is a {type(model).__name__} without an nn.ModuleList of its {count} layers: pass one that has it"
        )
    return list(lists[0])


def has_dropout(model: nn.Module) -> bool:
    """Whether some module of a model has a probability of dropout above 0, also one that it passes to a function.

    Numbers are told by their names (`dropout`, `attention_dropout`, `layerdrop` ...), so it may be one without effect.
    """
    for module in model.modules():
        kind = type(module).__name__.lower()
        numbers = {name: x for name, x in vars(module).items() if isinstance(x, float)}  # p is that of nn.Dropout
        if any(x > 0 and ("drop" in name or (name == "p" and "drop" in kind)) for name, x in numbers.items()):
            return True
    return False

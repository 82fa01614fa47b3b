"""The parts of a Hugging Face model, found by its configuration."""

from __future__ import annotations

from typing import Any

from torch import nn


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

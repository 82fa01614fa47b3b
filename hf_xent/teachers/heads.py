"""A teacher's head as a file, beside its hidden states: a safetensors file, whose tensors are mapped into memory.

Beside int8 it has the factors of features, too, and its columns are multiplied by them (`forms`).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..ops import Head
from ..system.files import replace_atomically

FILE = "head.safetensors"
FACTORS = "factors"


def save_head(head: Head, file: Path, factors: np.ndarray | None = None) -> Path:
    """Write a head with its matrix, bias, adapter, gain, scale and softcap, and return the path.

    A matrix that is quantized is written as its values, and one that is split over ranks is gathered.

    Args:
        head: The head.
        file: Where it goes.
        factors: Of its features [D], which its columns are multiplied by.
    """
    from safetensors.torch import save_file

    if head.shard is not None:
        head = head[torch.arange(head.vocabulary, device=head.weight.device)]
    if not isinstance(head.weight, Tensor):
        head = replace(head, weight=head.weight.rows(slice(None)))
    tensors = {name: x.detach().cpu().contiguous() for name, x in head.tensors.items() if x is not None}
    if factors is not None:
        tensors[FACTORS] = torch.from_numpy(factors)
        for name, (_, columns) in head.matrices.items():
            tensors[name] = tensors[name] * tensors[FACTORS][columns].to(tensors[name].dtype)
    numbers = {"scale": head.scale, "softcap": head.softcap, "fp32": head.fp32}
    return replace_atomically(file, lambda draft: save_file(tensors, draft, {"head": json.dumps(numbers)}))


def load_head(file: Path) -> tuple[Head, np.ndarray | None]:
    """A head that `save_head` wrote, and its factors; tensors are read where they are used."""
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as stored:
        numbers = json.loads((stored.metadata() or {})["head"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  it is no dictionary
    factors = tensors.pop(FACTORS, None)
    return Head(**tensors, **numbers), None if factors is None else factors.numpy()

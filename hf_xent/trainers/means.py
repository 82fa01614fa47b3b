"""Totals and counts of what the steps of a training or an evaluation record, over all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Sums:
    """Pairs of a total and a count by name, added up on the device until they are taken."""

    def __init__(self) -> None:
        self._pairs: dict[str, Tensor] = {}  # name -> [total, count]

    def __contains__(self, name: str) -> bool:
        return name in self._pairs

    def add(self, name: str, total: Tensor | float, count: Tensor | float, device: torch.device) -> None:
        """Adds a total over `count` items."""
        pair = torch.stack([torch.as_tensor(x, device=device).detach().to(_wide(device)) for x in (total, count)])
        self._pairs[name] = self._pairs[name] + pair if name in self._pairs else pair

    def take(self, names: Sequence[str], accelerator: Any) -> dict[str, tuple[float, float]]:
        """Name -> (total, count) over all processes, which have to pass the same names; then starts from zero."""
        pairs, self._pairs = self._pairs, {}
        if not names:
            return {}
        zero = torch.zeros(2, dtype=_wide(accelerator.device), device=accelerator.device)
        table: Any = accelerator.reduce(torch.stack([pairs.get(name, zero) for name in names]), reduction="sum")
        return {name: (total, count) for name, (total, count) in zip(names, table.tolist(), strict=True)}


def _wide(device: torch.device) -> torch.dtype:
    """The dtype of sums over a whole evaluation."""
    return torch.float32 if device.type == "mps" else torch.float64

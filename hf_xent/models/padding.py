"""Sequences of unequal lengths as one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def padded(
    rows: Sequence[Sequence[int]], fill: int = 0, *, left: bool = False, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of ids as one tensor [N, T], filled up on the right (or the left), and their attention mask [N, T], 0 or 1.

    T is the length of the longest row; both are int64.
    """
    length = max(map(len, rows), default=0)
    gaps = [[fill] * (length - len(row)) for row in rows]
    ids = [[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, gaps, strict=True)]
    steps = torch.arange(length, device=device)
    sizes = torch.tensor([len(row) for row in rows], device=device, dtype=torch.long)[:, None]
    mask = steps >= length - sizes if left else steps < sizes
    return torch.tensor(ids, dtype=torch.long, device=device).reshape(len(rows), length), mask.long()

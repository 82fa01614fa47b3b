"""Checks of scores, views and labels, and one form for all: two or more columns in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORED = -100


def prepared(scores: Any, views: Any = None) -> tuple[Tensor, Tensor | None, int]:
    """Scores [M, C], views [V, M, C] and the number of columns that were given; one column s becomes the two 0 and s.

    Args:
        scores: Logits [M, K]; one score a row, [M] or [M, 1], is the log-odds of class 1 against class 0.
        views: Logits of V changed copies of the rows [V, M, K], [V, M] beside one score a row; None without.

    Returns:
        Scores and views in float64 on their device, C = max(2, K), and K.

    Raises:
        ValueError: Shapes that do not fit, no rows, or values that are not finite.
    """
    z = _numbers("scores", scores)
    z = z[:, None] if z.ndim == 1 else z
    if z.ndim != 2 or not z.numel():
        raise ValueError(f"scores has shape {list(z.shape)}: pass logits [M, K] of at least one row")
    if views is None:
        return _two(z), None, z.shape[1]
    v = _numbers("views", views)
    v = v[..., None] if v.ndim == 2 and z.shape[1] == 1 else v
    if v.ndim != 3 or v.shape[1:] != z.shape or not len(v):
        raise ValueError(
            f"views has shape {list(v.shape)}, scores {list(z.shape)}: pass the logits of at least one changed copy of"
            " every row, [V, M, K], in the order of the rows"
        )
    return _two(z), _two(v.to(z.device)), z.shape[1]


def labelled(labels: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Labels of the rows that have one, and which rows these are.

    Args:
        labels: The class of each row [M], 0 to C - 1, or -100 for a row that is left out.
        scores: What is labelled [M, C].

    Returns:
        Labels [m] and a mask [M].

    Raises:
        ValueError: Labels of another number or kind, classes that scores do not have, or no labels.
    """
    found = torch.as_tensor(labels, device=scores.device)
    if found.is_floating_point() and (found % 1 == 0).all():  # as tables have them
        found = found.long()
    if found.is_floating_point() or found.shape != scores.shape[:1]:
        raise ValueError(
            f"labels has shape {list(found.shape)} and dtype {found.dtype} for {len(scores)} rows: pass one class, a"
            " whole number, for every row"
        )
    kept = found.long() != IGNORED
    found = found[kept].long()
    classes = scores.shape[-1]
    if wrong := [label for label in found.unique().tolist() if not 0 <= label < classes]:
        raise ValueError(f"labels has {wrong[0]}: choose 0 to {classes - 1}, or {IGNORED} for a row to leave out")
    if not len(found):
        raise ValueError(f"labels has {IGNORED} alone: label at least one row")
    return found, kept


def _numbers(name: str, values: Any) -> Tensor:
    found = torch.as_tensor(values)
    found = found.to("cpu" if found.device.type == "mps" else found.device, torch.float64)  # mps has no float64
    if bad := int((~found.isfinite()).sum()):
        raise ValueError(f"{name} has {bad} values that are not finite: leave those rows out")
    return found


def _two(z: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(z), z], -1) if z.shape[-1] == 1 else z

"""Weights of classes, as `weight` of torch's F.cross_entropy: one constant number per token of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .statistics import wide


def class_weight_of(numbers: Any) -> Tensor:
    """Class weights from what a user passed, [V], in float32 or float64.

    Args:
        numbers: A tensor [V], or a list of V numbers.

    Returns:
        The tensor itself if it has a wide dtype, else a copy.

    Raises:
        ValueError: They are not one number per token, not finite, negative, or require a gradient.
    """
    weight = numbers
    if not isinstance(numbers, Tensor):
        try:
            weight = torch.tensor(numbers, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"class_weight is {numbers!r}: pass a number per token of the vocabulary, [V]") from None
    if weight.ndim != 1 or weight.is_complex() or weight.dtype == torch.bool or weight.is_meta:
        raise ValueError(
            f"class_weight is {weight.dtype} of shape {tuple(weight.shape)} on {weight.device}: pass a number per token"
            " of the vocabulary, [V]"
        )
    if weight.requires_grad:
        raise ValueError("class_weight requires a gradient, but gets none: pass class_weight.detach()")
    if not torch.compiler.is_compiling():  # which cannot trace a choice by values
        _check_values(weight)
    return weight.to(wide(weight.dtype))


def _check_values(weight: Tensor) -> None:
    wrong = ~((weight >= 0) & (weight < torch.inf))  # also NaN
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise ValueError(f"class_weight[{i}] is {weight[i].item()}: pass finite numbers >= 0")


def check_class_weight(weight: Tensor, size: int, device: torch.device | None = None) -> None:
    """Raise a ValueError that names the remedy unless there is a weight per token, on `device` if one is given."""
    if weight.shape != (size,) or (device is not None and weight.device != device):
        place = "" if device is None else f", on {device}"
        raise ValueError(
            f"class_weight has shape {tuple(weight.shape)} on {weight.device}: pass one number per row of weight,"
            f" [{size}]{place}"
        )

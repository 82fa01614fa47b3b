"""Heads of ordered classes: outputs that share one direction and differ by their biases, and where thresholds start.

    z_k = w x + b_k     every row of the weight is w, and gets the sum of the rows' gradients

The layer is an ordinary linear one. Rows that are equal and have equal gradients stay equal, and the layer is saved and
loaded as any other. The gradient is changed by a forward hook and not by one of the weight, because copies of a layer,
such as the one that PEFT trains (`modules_to_save`), keep the first and lose the second. The norm of the gradient
counts every row.

Source: Cao, Mirjalili and Raschka 2020, arXiv:1901.07884, whose layer has one weight and K - 1 biases.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def share_direction(head: nn.Module, shared: bool) -> None:
    """Makes all rows of a layer's weight its first row and keeps them equal in training, or no longer keeps them so.

    Args:
        head: The layer. One whose rows are equal already is not changed, and none is hooked twice.
        shared: Whether its outputs share their direction from now on.
    """
    layer: Any = head
    if shared and not hasattr(layer, "shares_direction"):
        layer.register_forward_hook(_through_the_sum, prepend=True)
    if shared or hasattr(layer, "shares_direction"):
        layer.shares_direction = shared
    if shared:
        with torch.no_grad():
            layer.weight.copy_(layer.weight[:1].clone().expand_as(layer.weight))


def start_thresholds(bias: Tensor, gaps: bool) -> None:
    """Sets the biases [K - 1] of a new head of K ordered classes.

    Args:
        bias: (K - 1, ..., 1) / (K - 1) from now on, as CORAL's authors start it, unless it is of gaps.
        gaps: Whether all but the first are the softplus's argument of the gap to the one before. They then start where
            all classes are equally likely.
    """
    width = len(bias)
    start = [(width - k) / width for k in range(width)]
    if gaps:
        levels = [math.log((width - k) / (k + 1)) for k in range(width)]
        start = [levels[0], *(math.log(math.expm1(above - below)) for above, below in pairwise(levels))]
    with torch.no_grad():
        bias.copy_(torch.tensor(start))


def _through_the_sum(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """The layer's output, with a gradient by which every row moves as all of them."""
    if not (layer.shares_direction and torch.is_grad_enabled()):
        return None
    total = layer.weight.sum(0)
    return F.linear(args[0], layer.weight.detach() + (total - total.detach()), layer.bias)

"""The attack on a batch: rows that are right are attacked, in evaluation mode, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn

from ..models.contexts import eval_mode
from ..options.ranges import check_count
from .base import flipped
from .inputs import ball_of, target_of
from .registered import get


class Attacked(NamedTuple):
    """What an attack has found."""

    inputs: Tensor
    """The inputs [B, ...] that were changed: pixels or samples in their dtype, or embeddings of tokens."""
    flipped: Tensor
    """Which rows are wrong under the attack [B], also those that were wrong before."""
    clean: Tensor
    """Which rows were right before it [B]."""
    passes: int
    """Forward passes of single rows."""


class Options(TypedDict, total=False):
    """What `attack` can be told beside its arguments."""

    norm: str
    """'inf' (the default) or '2'."""
    processor: Any
    """The image processor of the model, for images."""
    seed: int
    """Of the random starts; 0 if it is left out."""


def attack(
    model: nn.Module,
    batch: Mapping[str, Any],
    labels: Tensor,
    epsilon: float,
    steps: int = 100,
    method: Any = "pgd",
    **options: Unpack[Options],
) -> Attacked:
    """Looks for changes of the inputs, each within a ball, that make a classifier wrong.

    Args:
        model: A classifier of transformers of images, sounds or texts, or a `hf_xent.models.zero_shot.ZeroShot`.
        batch: Its inputs, on its device.
        labels: Ids of classes [B].
        epsilon: The radius of the ball, in the units of `hf_xent.robust.inputs`.
        steps: The forward and backward passes of a row, at most.
        method: A name of `ATTACKS`, with options if any: 'pgd:size=2'; or an attack as an object.
        **options: As in `Options`.

    Returns:
        The changed inputs, and which rows have flipped. Robust accuracy is the mean of `~flipped`.

    Raises:
        ValueError: An argument is out of its range, labels are outside of the classes, or the inputs cannot be changed.
    """
    norm, seed, processor = options.get("norm", "inf"), options.get("seed", 0), options.get("processor")
    found = get(method)
    check_count("steps", steps, 1)
    target = target_of(model, batch, labels)
    with eval_mode(model):
        ball = ball_of(target, epsilon, norm, processor)
        x = target.center()
        every = torch.arange(len(x), device=x.device)
        with torch.no_grad():
            logits = target.logits(x, every)
        _check_labels(labels, logits)
        wrong = flipped(logits, labels)
        right = (~wrong).nonzero().flatten()
        changed, passes = x.clone(), len(x)
        if len(right):
            part = target.rows(right)
            result = found.find(part, ball.rows(right), steps, torch.Generator().manual_seed(seed))
            changed[right], passes = result.x, passes + result.passes
            wrong[right] = result.done
        return Attacked(changed, wrong, ~flipped(logits, labels), passes)


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    if labels.shape != logits.shape[:1] or logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"labels are {tuple(labels.shape)}, logits {tuple(logits.shape)}: one label a row, two classes"
        )
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels are {labels.min()} to {labels.max()}, but the model has {logits.shape[1]} classes")

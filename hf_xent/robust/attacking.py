"""The attack on a batch: rows that are right are attacked, in evaluation mode, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor, nn

from ..models.contexts import eval_mode
from ..options.ranges import check_count, is_number
from .base import flipped
from .inputs import ball_of, settled, target_of
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

    norm: str | float
    """'inf' (the default) or '2', also as numbers."""
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

    The model is in evaluation mode meanwhile. Afterwards its mode, its gradients and the states of random numbers are
    what they were, also if an error or an interrupt ends the attack. What is found for a row depends neither on the
    other rows of the batch nor on their order, but for the rounding of the model's forward pass.

    Args:
        model: A classifier of transformers of images, sounds or texts, or a `hf_xent.models.zero_shot.ZeroShot`.
        batch: Its inputs, on its device.
        labels: Ids of classes [B], integers.
        epsilon: The radius of the ball, in the units of `hf_xent.robust.inputs`.
        steps: The forward and backward passes of a row, at most.
        method: A name of `ATTACKS`, with options if any: 'pgd:size=2'; or an attack as an object.
        **options: As in `Options`.

    Returns:
        The changed inputs, and which rows have flipped. Robust accuracy is the mean of `~flipped`.

    Raises:
        ValueError: An argument is out of its range, labels are outside of the classes, or the inputs cannot be changed.
        TypeError: There is no such option.
    """
    if unknown := [name for name in options if name not in Options.__annotations__]:
        raise TypeError(f"attack takes no {unknown[0]}: its options are {', '.join(Options.__annotations__)}")
    norm, seed, processor = str(options.get("norm", "inf")), options.get("seed", 0), options.get("processor")
    found = get(method)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {model!r}: load it first, for instance by AutoModelForImageClassification")
    check_count("steps", steps, 1)
    check_count("seed", seed, 0)
    if not is_number(epsilon, "(0, inf)"):
        raise ValueError(f"epsilon is {epsilon!r}: choose a number above 0")
    with _undisturbed(model, batch, seed):
        target = target_of(model, batch, labels)
        ball = ball_of(target, float(epsilon), norm, processor)
        x, every = target.center(), torch.arange(len(target.given), device=target.given.device)
        with torch.no_grad():
            target.before = logits = target.logits(x, every)
        _check_labels(target.labels, logits)
        wrong = flipped(logits, target.labels)
        clean, changed, passes = ~wrong, target.given.clone(), len(x)
        right = clean.nonzero().flatten()
        if len(right):
            part = target.rows(right)
            result = found.find(part, ball.rows(right), steps, seed)
            changed[right], passes = settled(result.x, part.given), passes + result.passes
            wrong[right] = result.done
    return Attacked(changed, wrong, clean, passes)


@contextmanager
def _undisturbed(model: nn.Module, batch: Mapping[str, Any], seed: int) -> Iterator[None]:
    """Evaluation mode with gradients, and random numbers of a model's own that the seed decides; undone at the end."""
    devices = {value.device for value in batch.values() if isinstance(value, Tensor) and value.is_cuda}
    with eval_mode(model), torch.inference_mode(False), torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels are {list(labels.shape)}, logits {list(logits.shape)}: attack a classifier of whole rows, with one"
            " label for each"
        )
    if logits.shape[1] < 2:
        raise ValueError("the model has one output: attack a classifier of two classes or more")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}: pass the ids of classes as integers")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels are {int(labels.min())} to {int(labels.max())}, but the model has {logits.shape[1]} classes: pass"
            " ids from 0 on"
        )

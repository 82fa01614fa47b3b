"""Signs of gradient masking: a model whose gradients lead attacks nowhere seems robust, and is not.

    found = masking(model, {"pixel_values": images}, labels, epsilon=8 / 255, processor=processor)
    found.signs                                     # sentences; none of them is no proof that the model is robust

Seven accuracies of the same rows are compared, and gradients are looked at:

| sign | why it is one |
|---|---|
| one step finds more than many | each of the many is such a step, unless gradients mislead |
| random points are as good as PGD | a gradient tells more than chance |
| a ball with (almost) all inputs leaves rows right | every class is in it |
| an attack on margins (PMA) finds more than PGD on cross-entropy | cross-entropy has no gradient where it saturates |
| inputs changed for another model flip more than its own | a white box knows more |
| gradients of the cross-entropy are zero, or next to it | there is nothing to follow |

Source: Athalye, Carlini and Wagner 2018, Obfuscated Gradients Give a False Sense of Security, arXiv:1802.00420, section
3.1; Carlini et al. 2019, On Evaluating Adversarial Robustness, arXiv:1902.06705.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.contexts import eval_mode
from ..options.ranges import check_count
from .attacking import attack
from .base import flipped, generators
from .inputs import PIXELS, TOKENS, ball_of, target_of
from .pgd import PGD

TINY = 1e-10
"""A gradient with no larger entry, for one unit of the ball, is next to zero."""
LARGE = 16
"""How many times epsilon the large ball is, for other inputs than images; of images it is the whole range."""
LEFT = 0.05
"""The share of rows that may stay right in the large ball."""
FLAT = 0.1
"""The share of rows whose gradient may be next to zero."""


class Options(TypedDict, total=False):
    """What `masking` can be told beside its arguments."""

    norm: str
    """'inf' (the default) or '2'."""
    processor: Any
    """The image processor of the model, for images."""
    seed: int
    """Of the random starts; 0 if it is left out."""
    surrogate: nn.Module | None
    """Another model for the same inputs and classes, whose changed inputs are tried on this one."""
    batch_size: int
    """Rows of one pass; 64 if it is left out."""


@dataclass(frozen=True)
class Masking:
    """What was measured; shares of rows from 0 to 1."""

    rows: int
    epsilon: float
    clean: float
    """Accuracy without an attack; the following ones are under one."""
    random: float
    """Random points of the ball, as many as PGD has steps; at most 50."""
    one_step: float
    """One sign step of length epsilon."""
    pgd: float
    """PGD on the cross-entropy."""
    pma: float
    """An attack on the margin of probabilities, of as many steps."""
    large: float
    """PGD in a ball that has about all inputs."""
    transfer: float | None
    """Inputs that PGD changed for the surrogate."""
    zero_gradients: float
    """Rows whose gradient of the cross-entropy is exactly zero."""
    tiny_gradients: float
    """Rows whose gradient is next to zero, or zero."""
    signs: tuple[str, ...]
    """Each sign that was seen, as a sentence with its numbers."""


def masking(
    model: nn.Module,
    batch: Mapping[str, Any],
    labels: Tensor,
    epsilon: float,
    steps: int = 50,
    **options: Unpack[Options],
) -> Masking:
    """Looks for signs that a model's gradients are masked; see the module's docstring.

    Args:
        model: A classifier, as for `attack`.
        batch: Its inputs [N, ...]; a hundred rows or more, since accuracies of few rows differ by chance.
        labels: Ids of classes [N].
        epsilon: The radius of the ball, as for `attack`.
        steps: Steps of the attacks.
        **options: As in `Options`.

    Returns:
        The accuracies, the shares of gradients, and the signs.

    Raises:
        ValueError: As `attack`, or a surrogate for texts.
    """
    check_count("steps", steps, 1)
    size = options.get("batch_size", 64)
    check_count("batch_size", size, 1)
    if options.get("surrogate") is not None and TOKENS in batch and PIXELS not in batch:
        raise ValueError("surrogate is given, but embeddings of tokens are each model's own: leave it out for texts")
    parts = [_measured(model, *part, epsilon, steps, options) for part in _parts(batch, labels, size)]
    means = {name: float(torch.cat([part[name] for part in parts]).double().mean()) for name in parts[0]}
    gap, values = means.pop("gap"), {"transfer": None, **means}
    gaps = torch.cat([part["gap"] for part in parts]).double()
    half = 1.96 * float(gaps.std()) / len(gaps) ** 0.5 if len(gaps) > 1 else float("inf")
    found: dict[str, Any] = {"rows": len(labels), "epsilon": float(epsilon), **values}
    return Masking(**found, signs=tuple(_signs(found, gap - half, steps)))


def _parts(batch: Mapping[str, Any], labels: Tensor, size: int) -> list[tuple[dict[str, Any], Tensor]]:
    """Slices of a batch."""
    found = []
    for start in range(0, len(labels), size):
        rows = slice(start, start + size)
        part = {name: value[rows] if isinstance(value, Tensor) else value for name, value in batch.items()}
        found.append((part, labels[rows]))
    return found


def _measured(
    model: nn.Module, batch: dict[str, Any], labels: Tensor, epsilon: float, steps: int, options: Options
) -> dict[str, Tensor]:
    """Which rows stay right [B], and which gradients are zero, and by how much PMA is below PGD."""
    given: Any = {name: value for name, value in options.items() if name in ("norm", "processor", "seed")}
    large = max(1.0, epsilon) if PIXELS in batch else LARGE * epsilon
    if PIXELS in batch and given.get("norm", "inf") != "inf":
        large = max(large, float(batch[PIXELS][0].numel()) ** 0.5)
    runs: dict[str, tuple[float, int, Any]] = {
        "one_step": (epsilon, 1, PGD(size=1.0)),
        "pgd": (epsilon, steps, PGD()),
        "pma": (epsilon, steps, "pma"),
        "large": (large, steps, PGD()),
    }
    wrong = {}
    for name, (radius, count, method) in runs.items():
        result = attack(model, batch, labels, radius, count, method, **given)
        wrong[name] = result.flipped.cpu()
    wrong["clean"] = ~result.clean.cpu()
    wrong |= _by_chance(model, batch, labels, epsilon, min(steps, 50), given)
    if (surrogate := options.get("surrogate")) is not None:
        moved = attack(surrogate, batch, labels, epsilon, steps, PGD(), **given).inputs
        wrong["transfer"] = _wrong(model, batch, labels, moved) | wrong["clean"]
    right = {name: ~value for name, value in wrong.items()}
    return {**right, **_gradients(model, batch, labels, given), "gap": right["pgd"].double() - right["pma"].double()}


@torch.no_grad()
def _by_chance(
    model: nn.Module, batch: dict[str, Any], labels: Tensor, epsilon: float, tries: int, given: dict[str, Any]
) -> dict[str, Tensor]:
    """Rows that random points of the ball flip."""
    target = target_of(model, batch, labels)
    ball, center = ball_of(target, epsilon, given.get("norm", "inf"), given.get("processor")), target.center()
    wrong = _wrong(model, batch, labels, center)
    for run in range(tries):
        wrong |= _wrong(model, batch, labels, ball.start(center, generators(center, given.get("seed", 0), run)))
    return {"random": wrong}


@torch.no_grad()
def _wrong(model: nn.Module, batch: dict[str, Any], labels: Tensor, x: Tensor) -> Tensor:
    """Rows that the model takes for another class at x, on the CPU."""
    target = target_of(model, batch, labels)
    with eval_mode(model):
        return flipped(target.logits(x, torch.arange(len(x), device=x.device)), labels).cpu()


def _gradients(model: nn.Module, batch: dict[str, Any], labels: Tensor, given: dict[str, Any]) -> dict[str, Tensor]:
    """Whether the gradient of the cross-entropy with respect to units of the ball is zero, or next to it."""
    target = target_of(model, batch, labels)
    unit = ball_of(target, 1.0, given.get("norm", "inf"), given.get("processor")).unit
    x = target.center().requires_grad_()
    with eval_mode(model), torch.enable_grad():
        logits = target.logits(x, torch.arange(len(x), device=x.device))
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), x)
    largest = (gradient * unit).abs().flatten(1).amax(1).cpu()
    return {"zero_gradients": largest == 0, "tiny_gradients": largest <= TINY}


def _signs(found: dict[str, Any], surely_lower: float, steps: int) -> list[str]:
    """The signs that are seen."""
    clean, one, pgd, chance = (found[name] for name in ("clean", "one_step", "pgd", "random"))
    signs = []
    if pgd > one:
        signs.append(f"One step leaves {one:.1%} right, {steps} steps more, {pgd:.1%}.")
    if pgd >= chance and pgd > 0 and chance < clean:
        signs.append(f"Random points of the ball leave {chance:.1%} right, PGD no less, {pgd:.1%}.")
    if found["large"] > LEFT:
        signs.append(f"In a ball of about all inputs, {found['large']:.1%} stay right.")
    if surely_lower > 0:
        signs.append(
            f"An attack on margins leaves {found['pma']:.1%} right, PGD on cross-entropy {pgd:.1%}: at least"
            f" {surely_lower:.1%} more, by the 95 % interval."
        )
    if found["transfer"] is not None and found["transfer"] < pgd:
        signs.append(f"Inputs changed for the surrogate leave {found['transfer']:.1%} right, PGD here {pgd:.1%}.")
    if found["tiny_gradients"] > FLAT:
        signs.append(
            f"The gradient of the cross-entropy is next to zero for {found['tiny_gradients']:.1%} of the rows, exactly"
            f" zero for {found['zero_gradients']:.1%}."
        )
    return signs

"""What an attack changes of a model's inputs, and by how much: pixels, samples of a sound, or embeddings of tokens.

| input | what is changed | epsilon is, for the norm 'inf' | and for '2' |
|---|---|---|---|
| `pixel_values` | pixels, within the range that the image processor makes of 0 to 1 | of a pixel from 0 to 1 | of the image in such pixels |
| `input_values`, `input_features` | samples or features; padding is left alone | of the standard deviation of the row | of the length of the row less its mean |
| `input_ids` | embeddings of tokens, whose ids are kept; padding is left alone | of the root mean square of the row's embeddings | of their mean length, for each token |

For sounds and the norm '2', epsilon is a ratio of noise to signal: 0.01 are 40 dB. All units are those of a row alone.
"""  # noqa: E501  the lines of a table

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..classes.base import ClassLoss
from ..classes.heads import classes_of, loss_of
from ..models.embeddings import embedded, token_embedding
from ..models.zero_shot import ZeroShot
from ..ops.statistics import widened
from .ball import TINY, Ball

PIXELS, TOKENS = "pixel_values", "input_ids"
SAMPLES = ("input_values", "input_features")
BRIGHTEST = 255


@dataclass
class Target:
    """A model and a batch as a function of the input that an attack changes: `logits(x', rows)`."""

    model: nn.Module
    inputs: dict[str, Any]
    """All inputs of the model [B, ...]."""
    name: str
    """The input that is changed."""
    given: Tensor
    """What is changed, before the attack [B, ...], in its dtype: the input, or its embeddings."""
    labels: Tensor
    """Ids of classes [B]."""
    classes: int | None = None
    """How many of the first logits are of classes; None for all."""
    before: Tensor | None = None
    """The logits before the attack [B, K], if they are known."""

    def center(self) -> Tensor:
        """The input before the attack [B, ...], in float32 or wider."""
        return widened(self.given)

    def rows(self, rows: Tensor) -> Target:
        """The target of some rows [R], in their order."""
        if len(rows) == len(self.given):
            return self
        inputs, before = self._inputs(rows), None if self.before is None else self.before[rows]
        return Target(self.model, inputs, self.name, self.given[rows], self.labels[rows], self.classes, before)

    @contextmanager
    def moved(self, x: Tensor, rows: Tensor) -> Iterator[dict[str, Any]]:
        """While it is open, the model reads x [R, ...] if it is called with these inputs, those of the rows [R].

        It sees `settled(x)`, to which gradients are passed as they are.
        """
        given = self.given if len(rows) == len(self.given) else self.given[rows]
        seen = x if x.dtype == given.dtype else (x + (settled(x.detach(), given) - x.detach())).to(given.dtype)
        if self.name == TOKENS:
            with embedded(self.model, seen.flatten(0, -3)):  # models of multiple choice read choices as rows
                yield self._inputs(rows)
        else:
            yield {**self._inputs(rows, self.name), self.name: seen}

    def logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """The logits [R, K] of the rows [R] for inputs x [R, ...] as in `moved`, float32 or wider."""
        with self.moved(x, rows) as inputs:
            logits = widened(self.model(**inputs).logits)
        return logits if self.classes is None else logits[..., : self.classes]

    def _inputs(self, rows: Tensor, without: str = "") -> dict[str, Any]:
        """The inputs of some rows, in their order; without copies, if these are all of them."""
        count = len(self.given)
        inputs = {name: value for name, value in self.inputs.items() if name != without}
        if len(rows) == count:
            return inputs
        of_rows = {n: v[rows] for n, v in inputs.items() if isinstance(v, Tensor) and v.ndim and len(v) == count}
        return inputs | of_rows


def settled(x: Tensor, given: Tensor) -> Tensor:
    """x [R, ...] in the dtype of `given`, rounded so that no number is farther from it: what is in a ball stays there.

    Both the attack's own judgement and the inputs that it returns are these numbers.
    """
    nearest = x.to(given.dtype)
    if given.itemsize >= 4:
        return nearest
    center = given.to(x.dtype)
    farther = (nearest.to(x.dtype) - center).abs() > (x - center).abs()
    outward = (given > nearest) == (nearest > 0)  # whether the neighbour on the side of `given` is a longer number
    neighbour = (nearest.view(torch.int16) + torch.where(outward, 1, -1).to(torch.int16)).view(given.dtype)
    return nearest.where(~farther, neighbour.where(nearest != 0, given))


def target_of(model: nn.Module, batch: Mapping[str, Any], labels: Tensor) -> Target:
    """The target of an attack.

    Raises:
        ValueError: The batch has no rows or no input that can be changed, or what the model decides is not the largest
            of its logits.
    """
    inputs = {name: _usable(value) for name, value in batch.items() if name != "labels"}
    name = next((name for name in (PIXELS, *SAMPLES, TOKENS) if name in inputs), None)
    if name is None:
        known = ", ".join((PIXELS, *SAMPLES, TOKENS))
        raise ValueError(f"batch has {', '.join(inputs) or 'no inputs'}: give one of {known}")
    if not isinstance(inputs[name], Tensor) or not inputs[name].ndim or not inputs[name].numel():
        raise ValueError(f"{name} of the batch is empty or no tensor: give a tensor with a row for each label")
    given = _embeddings(model, inputs[name]) if name == TOKENS else inputs[name].detach()
    if not given.is_floating_point():
        raise ValueError(f"{name} are {given.dtype}: pass the floating point numbers that the processor returns")
    if not bool(given.isfinite().all()):
        raise ValueError(f"{name} have numbers that are nan or infinite: attack inputs without these")
    return Target(model, inputs, name, given, _ids(labels).to(given.device), _classes(model))


def ball_of(target: Target, epsilon: float, norm: str, processor: Any = None) -> Ball:
    """The ball of a radius `epsilon` in the units of the module's table.

    Raises:
        ValueError: Images without a processor that has a mean and a standard deviation, or outside of its range; a mask
            of padding of another length than the inputs.
    """
    if target.name == PIXELS:
        return _ball_of_pixels(target, epsilon, norm, processor)
    x, mask = target.center(), _unpadded(target)
    dims = tuple(range(1, x.ndim))
    if target.name == TOKENS:
        kept = torch.ones_like(x[..., :1], dtype=torch.bool) if mask is None else mask
        lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        mean = (lengths * kept).sum(dims, keepdim=True) / kept.sum(dims, keepdim=True).clamp(min=1)
        unit = mean if norm == "2" else mean / x.shape[-1] ** 0.5
        return Ball(epsilon, norm, unit.clamp(min=TINY), mask=mask, vector=1)
    weight = torch.ones_like(x) if mask is None else mask.expand_as(x).to(x.dtype)
    count = weight.sum(dims, keepdim=True).clamp(min=1)
    mean = (x * weight).sum(dims, keepdim=True) / count
    length = torch.linalg.vector_norm((x - mean) * weight, dim=dims, keepdim=True)
    return Ball(epsilon, norm, (length if norm == "2" else length / count.sqrt()).clamp(min=TINY), mask=mask)


def bounds(processor: Any) -> tuple[list[float], list[float]]:
    """The least and the largest value of each channel after a processor.

    Raises:
        ValueError: It has no mean and standard deviation, or its mean of several channels has another length.
    """
    processor = getattr(processor, "image_processor", processor)
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if not getattr(processor, "do_normalize", True):
        mean, std = [0.0], [1.0]
    if mean is None or std is None:
        raise ValueError(
            f"processor is {type(processor).__name__} without image_mean and image_std, which epsilon is measured by:"
            " pass the image processor of the model"
        )
    means, stds = ([float(v) for v in (value if hasattr(value, "__len__") else [value])] for value in (mean, std))
    if len(means) != len(stds) or not means or min(stds) <= 0:
        raise ValueError(f"processor has image_mean {mean} and image_std {std}: give as many of each, all std above 0")
    rescales = getattr(processor, "do_rescale", True)
    factor = getattr(processor, "rescale_factor", None) or 1 / BRIGHTEST
    top = BRIGHTEST * factor if rescales else 1.0
    low = -1.0 if rescales and getattr(processor, "rescale_offset", False) and top > 1 else 0.0
    ends = (low, top + low)
    dark, bright = ([(end - m) / s for m, s in zip(means, stds, strict=True)] for end in ends)
    return dark, bright


def _ball_of_pixels(target: Target, epsilon: float, norm: str, processor: Any) -> Ball:
    x = target.center()
    ends = bounds(processor)
    if x.ndim < 4 or len(ends[0]) not in (1, x.shape[-3]):
        raise ValueError(
            f"{PIXELS} are {list(x.shape)}, but the processor has {len(ends[0])} channels: pass [B, ..., C, H, W]"
        )
    shape = (*[1] * (x.ndim - 3), -1, 1, 1)
    low, high = (torch.tensor(end, dtype=x.dtype, device=x.device).view(shape) for end in ends)
    dims = tuple(i for i in range(1, x.ndim) if i != x.ndim - 3)
    least, most = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    slack = (high - low) * torch.finfo(target.given.dtype).eps * 2 + 1e-5
    if bool((least < low - slack).any() or (most > high + slack).any()):
        raise ValueError(
            f"{PIXELS} go from {float(least.min()):.4g} to {float(most.max()):.4g}, outside of the processor's"
            f" {float(low.min()):.4g} to {float(high.max()):.4g}: pass the processor that made them"
        )
    # a pixel that rounding has put beside the range stays in the ball
    return Ball(epsilon, norm, high - low, low.minimum(least), high.maximum(most))


def _unpadded(target: Target) -> Tensor | None:
    """Where the input is not padding, as bool with the input's dimensions; None without a mask."""
    mask, shape = target.inputs.get("attention_mask"), target.given.shape
    if mask is None:
        return None
    if mask.shape == shape[:-1]:  # of tokens
        return mask.bool().unsqueeze(-1)
    places = [i for i in range(1, len(shape)) if mask.ndim == 2 and shape[i] == mask.shape[1]]
    if not places:
        raise ValueError(f"attention_mask is {list(mask.shape)}, {target.name} {list(shape)}: give a mask of its steps")
    return mask.bool().view(len(mask), *[shape[i] if i == places[0] else 1 for i in range(1, len(shape))])


def _embeddings(model: nn.Module, ids: Tensor) -> Tensor:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model is a {type(model).__name__}, whose decoder reads the embeddings too: attack texts of an encoder or"
            " a decoder alone"
        )
    with torch.no_grad():
        found: Tensor = token_embedding(model)(ids)
    return found.detach()


def _classes(model: nn.Module) -> int | None:
    """How many of a model's logits are of classes, of which it decides for the largest."""
    if isinstance(model, ZeroShot) or getattr(model, "config", None) is None or (loss := loss_of(model)) is None:
        return None
    classes = classes_of(model)
    if type(loss).predict is not ClassLoss.predict or loss.labels != "classes" or loss.outputs(classes) < classes:
        raise ValueError(
            f"model was resized for {loss!r}, which does not decide for the largest of {classes} logits: attack a"
            " classifier of another loss"
        )
    return classes


def _usable(value: Any) -> Any:
    """A tensor of inference mode as one that gradients can pass."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _ids(labels: Any) -> Tensor:
    """Labels as a tensor; whole numbers of any width are ids."""
    labels = _usable(torch.as_tensor(labels))
    return labels if labels.is_floating_point() or labels.dtype == torch.bool else labels.long()

"""What an attack changes of a model's inputs, and by how much: pixels, samples of a waveform, or embeddings of tokens.

| input | what is changed | epsilon is |
|---|---|---|
| `pixel_values` | the pixels | of pixels from 0 to 1; the bounds are those of the image processor, channel by channel |
| `input_values`, `input_features` | the samples | of the standard deviation of each row |
| `input_ids` | embeddings of tokens, whose ids are kept; padding is left alone | of the mean length of an embedding |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.embeddings import embedded, token_embedding
from .ball import Ball

PIXELS, TOKENS = "pixel_values", "input_ids"
SAMPLES = ("input_values", "input_features")


@dataclass
class Target:
    """A model and a batch as a function of the input that an attack changes: `logits(x', rows)`."""

    model: nn.Module
    inputs: dict[str, Any]
    """All inputs of the model [B, ...]."""
    name: str
    """The input that is changed."""
    labels: Tensor
    """Ids of classes [B]."""

    def center(self) -> Tensor:
        """The input before the attack [B, ...], in float32 or wider."""
        value = self.inputs[self.name]
        if self.name == TOKENS:
            with torch.no_grad():
                value = token_embedding(self.model)(value)
        return (value if value.itemsize > 4 else value.float()).detach()

    def rows(self, rows: Tensor) -> Target:
        """The target of some rows [R]."""
        inputs = {name: value[rows] if isinstance(value, Tensor) else value for name, value in self.inputs.items()}
        return Target(self.model, inputs, self.name, self.labels[rows])

    @contextmanager
    def moved(self, x: Tensor, rows: Tensor) -> Iterator[dict[str, Any]]:
        """While it is open, the model reads x [R, ...] if it is called with these inputs, those of the rows [R]."""
        inputs = {name: value[rows] if isinstance(value, Tensor) else value for name, value in self.inputs.items()}
        if self.name == TOKENS:
            with embedded(self.model, x):
                yield inputs
        else:
            yield {**inputs, self.name: x.to(self.inputs[self.name].dtype)}

    def logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """The logits [R, K] of the rows [R] for inputs x [R, ...], float32 or wider."""
        with self.moved(x, rows) as inputs:
            logits: Tensor = self.model(**inputs).logits
        return logits if logits.itemsize > 4 else logits.float()


def target_of(model: nn.Module, batch: Mapping[str, Any], labels: Tensor) -> Target:
    """The target of an attack. Raises: ValueError if the batch has no input that can be changed."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    name = next((name for name in (PIXELS, *SAMPLES, TOKENS) if name in inputs), None)
    if name is None:
        known = ", ".join((PIXELS, *SAMPLES, TOKENS))
        raise ValueError(f"batch has {', '.join(inputs) or 'no inputs'}: give one of {known}")
    return Target(model, inputs, name, labels)


def ball_of(target: Target, epsilon: float, norm: str, processor: Any = None) -> Ball:
    """The ball of a radius `epsilon` in the units of the module's table.

    Raises:
        ValueError: Images without a processor that has a mean and a standard deviation.
    """
    x = target.center()
    if target.name == TOKENS:
        mask = target.inputs.get("attention_mask")
        lengths = x.norm(dim=-1)
        kept = torch.ones_like(lengths, dtype=torch.bool) if mask is None else mask.bool()
        return Ball(epsilon, norm, float(lengths[kept].mean()), mask=kept.unsqueeze(-1), vector=1)
    if target.name == PIXELS:
        low, high = bounds(processor)
        shape = (-1, *[1] * (x.ndim - 2))
        low, high = (torch.tensor(end, dtype=x.dtype, device=x.device).view(shape) for end in (low, high))
        return Ball(epsilon, norm, high - low, low, high)
    return Ball(epsilon, norm, float(x.std()))


def bounds(processor: Any) -> tuple[list[float], list[float]]:
    """The least and the largest value of each channel after a processor. Raises: ValueError without mean and std."""
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if not mean or not std:
        raise ValueError(
            f"processor is {type(processor).__name__} without image_mean and image_std, which epsilon is measured by:"
            " pass the image processor of the model"
        )
    return [(0 - m) / s for m, s in zip(mean, std, strict=True)], [(1 - m) / s for m, s in zip(mean, std, strict=True)]

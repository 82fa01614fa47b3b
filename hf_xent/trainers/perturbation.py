"""The logits of inputs that were moved, within a ball, to where a loss of classes has its largest gap.

    x' = argmax_{|x' - x| <= radius} gap(z(x'), z(x), y)

The search is `hf_xent.robust.ascend`, and what is moved that of `hf_xent.robust.inputs`: pixels, samples, or embeddings
of tokens. It runs in evaluation mode, without dropout and without moving statistics of batches, and computes gradients
of inputs alone; the loss is then that of two passes in the model's own mode, through both of which it learns. A row
with several labels, such as a sentence with one for each token, is moved once, for the sum over its labels.

The search starts at a random point, which is a function of the seed, the step and the row's own content: it does not
depend on the batch the row is in, so that 1 x 8 rows are 8 x 1 and a run that is resumed is the same run. (Padding on
the left moves the content, and is another start.) In evaluation there is no step, and each row has one start.

A batch of n rows costs steps + 2 forward and steps backward passes beside the two of the loss.

Source: Madry et al. 2018, arXiv:1706.06083, for the search; Zhang et al. 2019, arXiv:1901.08573, for the two passes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..classes.base import ClassLoss
from ..models.contexts import eval_mode
from ..robust.ascent import ascend
from ..robust.ball import Ball
from ..robust.inputs import PIXELS, TOKENS, Target, ball_of, bounds, target_of
from .class_rows import RowReader

_ODD = 2654435761


@dataclass
class Perturbation:
    """Moves the inputs of a batch and reads the logits there; see the module's docstring."""

    loss: Any
    """The loss, which has `gap`, `radius`, `norm`, `steps` and `step`."""
    reader: RowReader
    processor: Any
    """The image processor, for images."""

    @classmethod
    def of(cls, loss: ClassLoss, reader: RowReader, model: nn.Module, processor: Any) -> Perturbation | None:
        """That of a loss, or None for one that needs none.

        Raises:
            ValueError: The loss has no radius, or the model reads images and the processor has no mean and std.
        """
        if "perturbed" not in loss.needs:
            return None
        if getattr(loss, "radius", None) is None:
            raise ValueError(f"radius is None in {loss!r}: set how far inputs are moved, such as radius=0.03")
        if getattr(model, "main_input_name", None) == PIXELS:
            try:
                bounds(processor)
            except ValueError:
                kind = type(processor).__name__
                raise ValueError(
                    f"processing_class is a {kind} without image_mean and image_std, which the radius of {loss!r} is"
                    " measured by: pass the image processor of the model"
                ) from None
        return cls(loss, reader, processor)

    def __call__(self, model: Any, inputs: Mapping[str, Any], labels: Tensor, key: tuple[int, int]) -> Tensor:
        """The logits [N, W] of moved inputs, with a gradient where gradients are enabled.

        Args:
            model: The model, without wrappers of data parallelism.
            inputs: Its inputs.
            labels: Those of the batch, as `RowReader.labels` reads them.
            key: The seed, and the step.

        Raises:
            ValueError: There is no input that can be moved.
        """
        target = target_of(model, inputs, labels)
        x = self.found(target, key)
        with target.moved(x, torch.arange(len(x), device=x.device)) as moved:
            return self.reader.logits(model(**moved), labels)

    def found(self, target: Target, key: tuple[int, int]) -> Tensor:
        """The inputs [B, ...] that the search finds."""
        loss, model, x = self.loss, target.model, target.center()
        ball, start = self.placed(target, x, key)
        kept = self.reader.kept(target.labels).flatten()
        labels = target.labels.flatten().where(kept, 0)

        def logits(x: Tensor, rows: Tensor) -> Tensor:
            with target.moved(x, rows) as inputs:
                return self.reader.logits(model(**inputs), target.labels)

        def objective(step: int, x: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            return self.per_input(loss.gap(logits(x, rows), clean, labels).where(kept, 0), len(x)), None

        with eval_mode(model):
            with torch.no_grad():
                clean = logits(x, torch.arange(len(x), device=x.device))
            return ascend(objective, x, ball, [loss.step * loss.radius] * loss.steps, start, best=True).x

    def per_input(self, gaps: Tensor, count: int) -> Tensor:
        """The sums [B] of gaps over the labels of each input: of start and end, of tokens or pixels, or one."""
        return gaps.view(-1, count).sum(0) if self.reader.answers else gaps.view(count, -1).sum(1)

    def placed(self, target: Target, x: Tensor, key: tuple[int, int]) -> tuple[Ball, Tensor]:
        """The ball around each row, in units of that row, and a random point of it."""
        options = (self.loss.radius, self.loss.norm, self.processor)
        ball, rows = ball_of(target, *options), torch.arange(len(x), device=x.device).split(1)
        balls = [ball if target.name == PIXELS else ball_of(target.rows(row), *options) for row in rows]
        draws = [torch.Generator().manual_seed(zlib.crc32(struct.pack("<3q", *key, name))) for name in _names(target)]
        start = torch.cat([one.start(x[row], draw) for one, row, draw in zip(balls, rows, draws, strict=True)])
        if target.name != PIXELS:
            units = torch.stack([torch.as_tensor(one.unit, dtype=x.dtype).reshape(()) for one in balls])
            ball = replace(ball, unit=units.to(x.device).view(-1, *[1] * (x.ndim - 1)))
        return ball, start


def _names(target: Target) -> list[int]:
    """A number for each row that is a function of its content, without its padding."""
    value, mask = target.inputs[target.name].float(), target.inputs.get("attention_mask")
    if target.name == TOKENS and mask is not None:
        value = value * mask
    bits = value.contiguous().view(torch.int32).flatten(1).long()
    factors = _ODD * (2 * torch.arange(bits.shape[1], device=bits.device) + 1)
    names: list[int] = (bits * factors).sum(1).tolist()  # modulo 2^64
    return names

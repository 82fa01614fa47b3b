"""The logits of inputs that were moved, within a ball, to where a loss of classes has its largest gap.

    x' = argmax_{|x' - x| <= radius} gap(z(x'), z(x), y)

The search is `hf_xent.robust.ascend`, and what is moved that of `hf_xent.robust.inputs`: pixels, samples, or embeddings
of tokens. It runs in evaluation mode, without dropout and without moving statistics of batches, and computes gradients
of inputs alone; the loss is then that of two passes in the model's own mode, through both of which it learns. A row
with several labels, such as a sentence with one for each token, is moved once, for the sum over its labels.

The search starts at a random point, which is a function of the seed, the step and the row's own content: it does not
depend on the batch the row is in or on the padding of a text, so that 1 x 8 rows are 8 x 1 and a run that is resumed is
the same run. In evaluation there is no step: each row has one start.

A batch of n rows costs steps + 2 forward and steps backward passes beside the two of the loss.

Source: Madry et al. 2018, arXiv:1706.06083, for the search; Zhang et al. 2019, arXiv:1901.08573, for the two passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..classes.base import ClassLoss
from ..models.contexts import eval_mode
from ..robust.ascent import ascend
from ..robust.ball import Ball
from ..robust.base import generators
from ..robust.inputs import PIXELS, TOKENS, Target, ball_of, bounds, target_of
from .class_rows import RowReader


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
        ball, start = self.placed(target, key)
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

    def placed(self, target: Target, key: tuple[int, int]) -> tuple[Ball, Tensor]:
        """The ball around each row, and a random point of it."""
        ball, x = ball_of(target, self.loss.radius, self.loss.norm, self.processor), target.center()
        content = target.inputs[TOKENS] if target.name == TOKENS else x  # embeddings move with training, ids do not
        if target.name != TOKENS or ball.mask is None:
            return ball, ball.start(x, generators(content, *key))
        start = x.clone()
        for i, kept in enumerate(ball.mask.squeeze(-1)):  # as if there were no padding
            row = replace(ball.rows(torch.tensor([i], device=x.device)), mask=None)
            start[i, kept] = row.start(x[i, kept].unsqueeze(0), generators(content[i, kept].unsqueeze(0), *key))[0]
        return ball, start

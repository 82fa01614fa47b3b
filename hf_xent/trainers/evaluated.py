"""A trainer whose evaluations measure more than the loss, and whose `compute_metrics` gets no logits if it wants none.

transformers keeps the logits [N, T, V] of a whole evaluation set for `compute_metrics`. With `streamed_metrics` it gets
`hf_xent.trainers.evaluation.StreamedMetrics` instead, which are V times smaller, gathered and padded by -100 as logits
are. What is measured here costs one more product with the head per token.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import EvalPrediction

from ..lazy import TracedLogits
from .base import Mixin
from .batches import shifts_labels
from .evaluation import IGNORED, Evaluation, StreamedMetrics
from .weights import TOKENS

MEASURES = ("eval_top_k", "eval_calibration", "eval_bits_per_byte", "streamed_metrics")


class Evaluated(Mixin):
    """Goes before `Method` in the bases of a trainer whose configuration has `LossOptions`."""

    def __init__(self, *args: Any, **kwargs: Any):
        config = kwargs["args"]
        if config.streamed_metrics:
            if kwargs.get("preprocess_logits_for_metrics") is not None:
                raise ValueError(
                    "preprocess_logits_for_metrics is given, but streamed_metrics is True, which leaves no logits: pass"
                    " one of them"
                )
            if kwargs.get("compute_metrics") is not None:
                kwargs["compute_metrics"] = Streamed(kwargs["compute_metrics"])
        super().__init__(*args, **kwargs)
        if config.eval_bits_per_byte and not hasattr(self.processing_class, "decode"):
            raise ValueError(
                "eval_bits_per_byte is True, but processing_class is"
                f" {type(self.processing_class).__name__}: pass the tokenizer, whose text has the bytes"
            )
        self._new_evaluation()

    def _new_evaluation(self) -> None:
        self._evaluation = Evaluation(self.args, self.processing_class)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the stock trainer, with the measures of this evaluation and `StreamedMetrics` if they are asked for."""
        self._new_evaluation()
        output = super().evaluation_loop(*args, **kwargs)
        if self.args.streamed_metrics and output.predictions is not None:
            output = output._replace(predictions=_streamed(output.predictions))
        return output

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As the stock trainer. Raises: ValueError for a batch without labels, of which nothing can be measured."""
        if self.args.streamed_metrics and not prediction_loss_only and inputs.get("labels") is None:
            raise ValueError(
                "streamed_metrics is True, but a batch has no labels, whose log-probabilities it measures: add them, or"
                " set it to False"
            )
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _measured(self, logits: Any, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Measure a batch of an evaluation; the predictions, [B, T] each, if there are to be streamed ones."""
        labels = inputs.get("labels")
        if self._in_training is not False or labels is None or not any(getattr(self.args, x) for x in MEASURES):
            return None
        if TOKENS in inputs:
            labels = torch.where(inputs[TOKENS] == 0, IGNORED, labels)
        if isinstance(logits, TracedLogits):  # of a compiled model
            logits = logits.lazy()
        with torch.no_grad():
            found = self._evaluation.add(logits, labels, shift=shifts_labels(self.model))
        return found if self.args.streamed_metrics else None

    def _means(self, training: bool) -> dict[str, float]:
        means: dict[str, float] = super()._means(training)
        if not training and any(getattr(self.args, name) for name in MEASURES):
            means |= self._evaluation.metrics(self.accelerator)
        return means


@dataclass
class Streamed:
    """A user's `compute_metrics` that gets `StreamedMetrics`."""

    function: Any

    def __post_init__(self) -> None:
        self.__signature__ = inspect.signature(self.function)  # of which transformers asks for `compute_result`

    def __call__(self, found: EvalPrediction, **options: Any) -> Any:
        """The metrics."""
        predictions = _streamed(found.predictions)
        return self.function(EvalPrediction(predictions, found.label_ids, found.inputs, found.losses), **options)


def _streamed(predictions: Any) -> Any:
    """Predictions with names; a list of them, of one batch each, if transformers has not joined the batches."""
    if isinstance(predictions, list):
        return [StreamedMetrics(*batch) for batch in predictions]
    return StreamedMetrics(*predictions)

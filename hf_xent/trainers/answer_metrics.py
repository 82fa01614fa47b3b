"""A `compute_metrics` for extractive question answering: exact match and F1 of answers, mAP@k of positions."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from ..data.questions import Answer, answers_of
from ..metrics.answers import exact_match, f1, map_at_k


class AnswerMetrics:
    """Measures the answers of windows; for the `compute_metrics` of any trainer of a question-answering model.

    Args:
        rows: The rows, with `id`, `context` and `answers`.
        windows: Their windows, by `hf_xent.data.questions.windows`: the data set that is evaluated.
        max_answer_tokens: The most tokens of an answer.
        no_answer: Whether the empty answer is a candidate, as in SQuAD 2.
        top_k: k of mAP@k.
        tolerance: How far from the true position a hit may be; see `hf_xent.metrics.answers`.
    """

    def __init__(
        self,
        rows: Any,
        windows: Any,
        *,
        max_answer_tokens: int = 30,
        no_answer: bool = False,
        top_k: int = 10,
        tolerance: int = 5,
    ):
        self.rows, self.windows = rows, windows
        self.options: dict[str, Any] = {"max_answer_tokens": max_answer_tokens, "no_answer": no_answer}
        self.top_k, self.tolerance = top_k, tolerance

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """The means over rows of `exact_match` and `f1`, and over windows `map_at_k`, between 0 and 1."""
        start, end = (_joined(part) for part in prediction.predictions[:2])
        answers = self.answers((start, end))
        golds = {row_id: found["text"] for row_id, found in zip(self.rows["id"], self.rows["answers"], strict=True)}
        positions = [np.asarray(self.windows[name]) for name in ("start_positions", "end_positions")]
        means = [
            map_at_k(torch.as_tensor(x), torch.as_tensor(y), self.top_k, self.tolerance).item()
            for x, y in zip((start, end), positions, strict=True)
        ]
        return {"map_at_k": fmean(means)} | {
            name: fmean(measure(best[0].text, golds[row_id]) for row_id, best in answers.items())
            for name, measure in MEASURES.items()
        }

    def answers(self, logits: tuple[Any, Any], n_best: int = 1) -> dict[str, list[Answer]]:
        """Row id -> its best answers; see `hf_xent.data.questions.answers_of`.

        Args:
            logits: The logits of the start and of the end, [N, T] each, as `Trainer.predict` returns them.
            n_best: How many of each row.
        """
        return answers_of(self.rows, self.windows, logits, n_best=n_best, **self.options)


MEASURES: dict[str, Callable[[str, list[str]], float]] = {"exact_match": exact_match, "f1": f1}


def _joined(part: Any) -> np.ndarray:
    """Logits [N, T]; batches that `eval_do_concat_batches=False` leaves apart are padded as transformers does."""
    if not isinstance(part, list):
        return np.asarray(part)
    padded = np.full((sum(map(len, part)), max(batch.shape[1] for batch in part)), -100.0, dtype=np.float32)
    end = 0
    for batch in part:
        start, end = end, end + len(batch)
        padded[start:end, : batch.shape[1]] = batch
    return padded

"""Multi-aspect distillation: a classifier also learns a language model's answers to yes/no questions about each row.

    CE(softmax(z_1..z_K), y) + alpha mean_q BCE(sigmoid(z_K+q), P_q)

P_q in [0, 1] is the probability that the language model answers question q about the row by yes
(`hf_xent.generation.aspects`). The head has K + Q outputs, of which the last Q are for training alone: prediction reads
the first K. A row without answers, as in a test set, has its cross-entropy alone. The weight alpha multiplies a mean
over questions, so more questions do not weigh more. With alpha 0 the loss is cross-entropy.

Source: Lee et al. 2025, Multi-aspect Knowledge Distillation with Large Language Model, arXiv:2501.13341; alpha 4 and 50
questions are those of the authors' configuration for fine-grained images.
Relations: label smoothing and plain distillation change the target of the classes; this adds targets that are not
classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from ..options.ranges import check_count
from .base import ClassLoss


@dataclass(frozen=True)
class Aspects(ClassLoss):
    """Cross-entropy of the classes, and binary cross-entropy of the aspects; see the module's docstring."""

    questions: int = 50
    """Q, the number of questions."""
    alpha: float = 4.0
    """The weight of the aspects."""
    needs: ClassVar[tuple[str, ...]] = ("column:aspects",)
    ranges: ClassVar[dict[str, str]] = {"alpha": "[0, inf)"}

    def __post_init__(self) -> None:
        check_count("questions", self.questions, 1)
        super().__post_init__()

    def outputs(self, classes: int) -> int:
        """K + Q."""
        return classes + self.questions

    def __call__(self, logits: Tensor, labels: Tensor, aspects: Tensor | None = None, **_: Tensor) -> Tensor:
        """The loss [N] of logits [N, K + Q], labels [N] and aspects [N, Q]; cross-entropy alone without aspects.

        Raises:
            ValueError: The aspects are not Q probabilities a row.
        """
        loss = F.cross_entropy(logits[:, : -self.questions], labels, reduction="none")
        if aspects is None:
            return loss
        if aspects.shape != (len(logits), self.questions) or not bool(((aspects >= 0) & (aspects <= 1)).all()):
            raise ValueError(
                f"aspects has the shape {tuple(aspects.shape)} for {len(logits)} rows, with values from"
                f" {aspects.min() if aspects.numel() else None} to {aspects.max() if aspects.numel() else None}: give"
                f" each row {self.questions} probabilities, or set questions"
            )
        answers = logits[:, -self.questions :]
        bce = F.binary_cross_entropy_with_logits(answers, aspects.to(answers.dtype), reduction="none")
        return loss + self.alpha * bce.mean(-1)

    def scores(self, logits: Tensor) -> Tensor:
        """The probabilities of the K classes."""
        return logits[..., : -self.questions].softmax(-1)

    def reference(self, logits: Any, labels: Any, aspects: Any = None, **_: Any) -> np.ndarray:
        """-log p_y - alpha / Q sum_q [P_q log s_q + (1 - P_q) log(1 - s_q)], with s = sigmoid(z)."""
        z = np.asarray(logits, np.float64)
        classes, answers = np.split(z, [z.shape[1] - self.questions], axis=1)
        p = np.exp(classes) / np.exp(classes).sum(1, keepdims=True)
        loss = -np.log(p[np.arange(len(z)), np.asarray(labels)])
        if aspects is None:
            return loss
        target, s = np.asarray(aspects, np.float64), 1 / (1 + np.exp(-answers))
        likelihood = target * np.log(s) + (1 - target) * np.log(1 - s)
        return loss - self.alpha * likelihood.sum(1) / self.questions

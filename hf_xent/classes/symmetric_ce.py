"""Symmetric cross-entropy of a model and its teacher, in both directions, beside the cross-entropy of the labels.

    ce_weight CE(q, y) - (1 - alpha) sum_c t_c log q_c - alpha sum_c q_c log t_c

q is the model's softmax and t that of a second model or pass, without a gradient; Robust Mean Teacher has a moving
average of the model for it. The gradient goes through both q and log q. Equal outputs leave their entropy, and not 0;
alpha 0 is plain distillation, and alpha 1 lets the model choose which of the teacher's classes to believe.

With ce_weight 0 labels are not looked at, but rows without one are left out before: give them any class.

Source: Doebler et al. 2022, Robust Mean Teacher for Continual and Gradual Test-time Adaptation, arXiv:2211.13081;
ce_weight is their weight of the source data, which are other rows there and the same ones here.
Relations: not the symmetric cross-entropy of Wang et al. 2019, which takes the label for the teacher and cuts log 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .base import ClassLoss


@dataclass(frozen=True)
class SymmetricCE(ClassLoss):
    """Cross-entropy of labels, and of a second model in both directions; see the module's docstring."""

    alpha: float = 0.5
    """The share of the direction in which the model is the target."""
    ce_weight: float = 1.0
    """The weight of the labels' cross-entropy; 0 learns from the second model alone."""
    needs: ClassVar[tuple[str, ...]] = ("second",)
    ranges: ClassVar[dict[str, str]] = {"alpha": "[0, 1]", "ce_weight": "[0, inf)"}

    def __call__(self, logits: Tensor, labels: Tensor, second: Tensor | None = None, **_: Any) -> Tensor:
        """The loss [N] of logits [N, K], labels [N] and the second model's logits [N, K].

        Raises:
            ValueError: There are no logits of a second model.
        """
        if second is None:
            raise ValueError("second is None: give the logits of a second model or pass")
        log_q, log_t = logits.log_softmax(-1), second.detach().to(logits.dtype).log_softmax(-1)
        forward, backward = -(log_t.exp() * log_q).sum(-1), -(log_q.exp() * log_t).sum(-1)
        loss = torch.lerp(forward, backward, self.alpha)
        return loss + self.ce_weight * F.nll_loss(log_q, labels, reduction="none") if self.ce_weight else loss

    def reference(self, logits: Any, labels: Any, second: Any = None, **_: Any) -> np.ndarray:
        """The formula on the two softmaxes."""
        q, t = (np.exp(np.asarray(z, np.float64)) for z in (logits, second))
        q, t = (x / x.sum(1, keepdims=True) for x in (q, t))
        both = (1 - self.alpha) * (t * np.log(q)).sum(1) + self.alpha * (q * np.log(t)).sum(1)
        return -both - self.ce_weight * np.log(q[np.arange(len(q)), np.asarray(labels)])

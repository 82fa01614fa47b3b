"""Cross-entropy with label smoothing and z-loss: the default objective of language modeling.

    loss = -(1 - eps) log p_y - (eps / V) sum_j log p_j + zeta lse^2

Source: z-loss: Chowdhery et al. 2022, PaLM, arXiv:2204.02311, sec. 5; label smoothing: Szegedy et al. 2016,
arXiv:1512.00567, sec. 7, as torch.nn.functional.cross_entropy defines it.
Statistics: lse, target; mean with label smoothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import Head, Stats
from ..ops.rows import token_ids
from ..options.ranges import check_number
from .base import Loss


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """`-(1 - eps) log p_y - (eps / V) sum_j log p_j + zeta lse^2` per token, nats.

    Raises:
        ValueError: A field is out of its range.
    """

    label_smoothing: float = 0.0
    """eps in [0, 1): share of the target spread evenly over the vocabulary."""
    z_loss: float = 0.0
    """zeta >= 0: weight of lse^2, which keeps the normalizer near 1 (PaLM: 1e-4)."""

    def __post_init__(self) -> None:
        check_number(self, "label_smoothing", "[0, 1)", "choose a share in [0, 1)")
        check_number(self, "z_loss", "[0, inf)", "choose a finite weight >= 0 (PaLM: 1e-4)")

    @property
    def uses(self) -> tuple[str, ...]:  # type: ignore[override]  # a constant in the base, here it depends on fields
        """The statistics that it differentiates: `mean` only with label smoothing."""
        return ("lse", "target", "mean") if self.label_smoothing else ("lse", "target")

    @property
    def linear(self) -> bool:  # type: ignore[override]  # likewise
        """Whether its gradients are constants: without z-loss, unless a subclass has another formula."""
        return not self.z_loss and type(self).of is CrossEntropy.of

    def of(self, stats: Stats) -> Tensor:
        """Per-token loss [N]."""
        loss = stats.nll
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * (stats.lse - stats.mean)
        return loss + self.z_loss * stats.lse**2 if self.z_loss else loss

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """Torch's cross-entropy, plus the z-loss."""
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        return loss + self.z_loss * logits.logsumexp(-1) ** 2


def linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    scale: float = 1.0,
    softcap: float | None = None,
    class_weight: Tensor | None = None,  # [V]
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **options: Any,
) -> Tensor:
    """Cross-entropy of `softcap(scale * (hidden @ weight.T + bias))` without the logits, in nats.

    The counterpart of torch's `F.linear_cross_entropy`.

    Args:
        hidden: Hidden states [..., D].
        weight: The head's weight [V, D].
        labels: Token ids [...].
        bias: The head's bias [V], or None.
        scale: The factor of the logits.
        softcap: A cap c > 0: logits become c tanh(logits / c), after the scale.
        class_weight: Weights of tokens by their label, [V], as `weight` of torch's F.cross_entropy.
        label_smoothing: Share of the target spread evenly over the vocabulary, in [0, 1).
        z_loss: Weight of lse^2.
        **options: Those of `Loss.compute`: reduction, num_items, token_weight, ignore_index, impl, memory_budget, tail.

    Returns:
        The loss, a scalar, or [...] with reduction='none'.

    Raises:
        ValueError: As in `Loss.compute`; or `class_weight` is combined with smoothing or token weights, which is not
            defined.
    """
    if class_weight is not None:
        if label_smoothing or options.get("token_weight") is not None:
            raise ValueError("class_weight is given with label_smoothing or token_weight: pass one of them alone")
        if class_weight.shape != weight.shape[:1] or class_weight.device != weight.device:
            raise ValueError(
                f"class_weight has shape {tuple(class_weight.shape)} on {class_weight.device}: pass one number per row"
                f" of weight, [{len(weight)}], on {weight.device}"
            )
        labels = token_ids(labels)
        # clamped: ignored labels may have any weight, and others outside of the vocabulary are refused by the loss
        options["token_weight"] = class_weight[labels.clamp(0, len(weight) - 1)]
    loss = CrossEntropy(label_smoothing=label_smoothing, z_loss=z_loss)
    return loss(hidden, Head(weight, bias, scale, softcap), labels, **options)

"""Cross-entropy with class weights, label smoothing and z-loss: the default objective of language modeling.

    loss = -(1 - eps) w_y log p_y - (eps / V) sum_j w_j log p_j + zeta lse^2

Class weights w are 1 by default; a mean divides by the sum of w_y over the tokens, but the z-loss by their number.

Source: z-loss: Chowdhery et al. 2022, PaLM, arXiv:2204.02311, sec. 5; label smoothing: Szegedy et al. 2016,
arXiv:1512.00567, sec. 7; class weights and both together: as torch.nn.functional.cross_entropy defines them.
Statistics: lse, target; mean with label smoothing.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import Head, Stats
from ..ops.class_weights import check_class_weight, class_weight_of
from ..ops.statistics import wide
from ..options.ranges import check_number
from .base import Loss, select_valid
from .reduction import Reduction


@dataclass(frozen=True, eq=False)
class CrossEntropy(Loss):
    """`-(1 - eps) w_y log p_y - (eps / V) sum_j w_j log p_j + zeta lse^2` per token, nats; w_j = 1 by default.

    With class weights and label smoothing the statistic `mean` is (1/V) sum_j w_j z_j, also where it is observed.

    Raises:
        ValueError: A field is out of its range.
    """

    label_smoothing: float = 0.0
    """eps in [0, 1): share of the target spread evenly over the vocabulary."""
    z_loss: float = 0.0
    """zeta >= 0: weight of lse^2, which keeps the normalizer near 1 (PaLM: 1e-4)."""
    class_weight: Any = None
    """w: a constant weight >= 0 per token of the vocabulary, a tensor or a list [V]; None for 1 each."""

    z_factor = 1.0  # what the z-loss is multiplied by: no field, but set by `on_labels` for one call

    def __post_init__(self) -> None:
        check_number(self, "label_smoothing", "[0, 1)", "choose a share in [0, 1)")
        check_number(self, "z_loss", "[0, inf)", "choose a finite weight >= 0 (PaLM: 1e-4)")
        if self.class_weight is not None:
            object.__setattr__(self, "class_weight", class_weight_of(self.class_weight))

    @classmethod
    def like_torch(cls, class_weight: Tensor | None, label_smoothing: float) -> CrossEntropy:
        """The loss with class weights as torch takes them: any numbers, which are not read on the host."""
        loss = cls(label_smoothing=label_smoothing)
        if class_weight is not None:
            object.__setattr__(loss, "class_weight", class_weight.to(wide(class_weight.dtype)))
        return loss

    def __repr__(self) -> str:
        weights = "" if self.class_weight is None else f", class_weight=<{len(self.class_weight)} weights>"
        return f"{type(self).__name__}(label_smoothing={self.label_smoothing}, z_loss={self.z_loss}{weights})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self) or not isinstance(other, CrossEntropy):
            return NotImplemented
        mine, others = self.class_weight, other.class_weight
        same = mine is others if mine is None or others is None else torch.equal(mine, others.to(mine.device))
        return same and (self.label_smoothing, self.z_loss) == (other.label_smoothing, other.z_loss)

    def __hash__(self) -> int:
        return hash((type(self), self.label_smoothing, self.z_loss, self.class_weight is None))

    @property
    def uses(self) -> tuple[str, ...]:  # type: ignore[override]  # a constant in the base, here it depends on fields
        """The statistics that it differentiates: `mean` only with label smoothing."""
        return ("lse", "target", "mean") if self.label_smoothing else ("lse", "target")

    @property
    def linear(self) -> bool:  # type: ignore[override]  # likewise
        """Whether it is linear in its statistics: without z-loss, unless a subclass has another formula."""
        return not self.z_loss and type(self).of is CrossEntropy.of

    def slopes(self, labels: Tensor) -> dict[str, Tensor | float]:
        """The derivatives by each statistic, without z-loss: numbers, or [N] with class weights."""
        eps, weight = self.label_smoothing, self._weight_on(labels.device)
        of_label, mean = (1.0, 1.0) if weight is None else (weight[labels], weight.mean())
        slopes: dict[str, Any] = {"lse": (1 - eps) * of_label + eps * mean, "target": -(1 - eps) * of_label}
        return slopes | {"mean": -eps} if eps else slopes

    def on_labels(self, labels: Tensor, valid: Tensor, size: int, reduction: Reduction) -> tuple[Loss, Reduction]:
        """With class weights, a mean divides by the sum of those of the labels, and the z-loss by their number."""
        weight = self._weight_on(labels.device)
        if weight is None:
            return self, reduction
        check_class_weight(weight, size)
        # clamped: ignored labels may have any weight, and others outside of the vocabulary are refused by the loss
        weighted = replace(reduction, label_weight=weight[labels.clamp(0, size - 1)])
        if not (self.z_loss and reduction.reduction == "mean" and reduction.num_items is None):
            return self, weighted
        call, token_weight = copy.copy(self), reduction.token_weight
        token_weight = weight.new_ones(()) if token_weight is None else token_weight
        by_label, by_token = (reduce.denominator(token_weight, valid) for reduce in (weighted, reduction))
        object.__setattr__(call, "z_factor", by_label / by_token)
        return call, weighted

    def of(self, stats: Stats) -> Tensor:
        """Per-token loss [N]."""
        loss, lse, weight = stats.nll, stats.lse, self._weight_on(stats.labels.device)
        if weight is not None:
            loss, lse = weight[stats.labels].to(loss.dtype) * loss, weight.mean().to(loss.dtype) * lse
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * (lse - stats.mean)
        return loss + self.z_loss * self.z_factor * stats.lse**2 if self.z_loss else loss

    def of_logits(self, logits: Tensor, stats: Stats) -> Tensor:
        """The losses of logits that exist, whose mean is weighted here."""
        rows, weight = select_valid(stats), self._weight_on(logits.device)
        if self.label_smoothing and weight is not None:
            rows.values["mean"] = logits[stats.mask].to(rows.lse.dtype) @ weight.to(rows.lse.dtype) / len(weight)
        return self.of(rows)

    def _weight_on(self, device: torch.device) -> Tensor | None:
        """The class weights on a device, which they follow once."""
        if self.class_weight is not None and self.class_weight.device != device:
            object.__setattr__(self, "class_weight", self.class_weight.to(device))
        return self.class_weight

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """Torch's cross-entropy, plus the z-loss."""
        weight = None if self.class_weight is None else self.class_weight.to(logits.dtype)
        loss = F.cross_entropy(logits, labels, weight, reduction="none", label_smoothing=self.label_smoothing)
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
        class_weight: A constant weight >= 0 per token of the vocabulary, [V], as `weight` of torch's F.cross_entropy:
            the mean divides by the sum of the labels' weights (times their token weights); the z-loss is not weighted.
        label_smoothing: Share of the target spread evenly over the vocabulary, in [0, 1).
        z_loss: Weight of lse^2.
        **options: Those of `Loss.compute`: reduction, num_items, token_weight, ignore_index, impl, memory_budget, tail.

    Returns:
        The loss, a scalar, or [...] with reduction='none'.

    Raises:
        ValueError: As in `Loss.compute`; or `class_weight` has a negative number, NaN or infinity, another length than
            the vocabulary, another device than the weight, or requires a gradient.
    """
    if class_weight is not None:
        check_class_weight(class_weight, len(weight), weight.device)
    loss = CrossEntropy(label_smoothing, z_loss, class_weight)
    return loss(hidden, Head(weight, bias, scale, softcap), labels, **options)

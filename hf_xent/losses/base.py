"""What a loss is: a frozen dataclass that turns a token's statistics into nats, and the reductions all losses share.

A loss of the statistics alone writes `of` and `uses`. One that compares with a second head (a teacher, unit
embeddings) also writes `second`. One that is not a function of statistics at all overrides `per_token`. Everything else
(reduction, token weights, backends, memory) is here.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..ops import Head, Payload, Stats, vocab_loss
from ..ops.functional import check_tail
from ..ops.rows import token_ids
from ..ops.statistics import wide


class Loss:
    """Base of every objective. Subclasses are frozen dataclasses; their fields are their hyper-parameters."""

    uses: tuple[str, ...] = ("lse", "target")  # statistics `of` differentiates; tests prove it exact
    needs_teacher = False  # whether `teacher=(hidden, head)` must be given

    def of(self, stats: Stats) -> Tensor:
        """Per-token loss [N] in nats from the statistics in `uses`."""
        raise NotImplementedError

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """The paper's formula on dense logits [N, V] and labels [N], per token [N]; independent of `of`, for tests.

        `second` is what a formula reads beside them: `weight`, the head's [V, D], and `teacher`, the teacher's dense
        logits [N, V]. Callers pass all they have and a loss takes what it needs. N tokens are one sequence where that
        matters.
        """
        raise NotImplementedError

    def second(self, head: Head, labels: Tensor, teacher: Payload | None) -> Payload | None:
        """The second head whose logits' expectation `stats.payload` is: ([..., D2], head of the same V), or None."""
        return None

    def bind(self, weight: Tensor) -> Loss:
        """The loss with all it takes from the pretrained head's weight [V, D] in its fields; `self` by default."""
        return self

    def __call__(self, hidden: Tensor, head: Head, labels: Tensor, **options: Any) -> Tensor:
        """The reduced loss alone; parameters as in `compute`."""
        return self.compute(hidden, head, labels, **options)[0]

    def compute(
        self,
        hidden: Tensor,  # [..., D]
        head: Head,
        labels: Tensor,  # [...]
        *,
        reduction: str = "mean",
        num_items: Tensor | float | None = None,
        token_weight: Tensor | None = None,  # [...], constant
        teacher: Payload | None = None,
        observe: tuple[str, ...] = (),
        ignore_index: int = -100,
        impl: str | None = None,
        memory_budget: int | None = None,
        tail: float = 0.0,
    ) -> tuple[Tensor, Stats]:
        """The loss over all tokens with a label, and their detached statistics (`observe` adds some).

        reduction: 'mean' divides the weighted sum by the sum of weights (0 if there is no token), 'sum', or 'none' for
        [...] with 0 at ignored positions. `num_items` divides the sum instead: the number of tokens of the whole
        accumulated batch, as transformers' Trainer counts it.

        Raises: ValueError for an unknown reduction, a missing teacher, or what `hf_xent.vocab_stats` refuses.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction is {reduction!r}: choose 'mean', 'sum' or 'none'")
        labels = token_ids(labels)
        if self.needs_teacher and teacher is None:
            raise ValueError(f"{type(self).__name__} compares with a teacher: pass teacher=(hidden, head)")
        weight = labels.new_ones(labels.shape, dtype=wide(hidden.dtype)) if token_weight is None else token_weight
        if reduction != "none":
            weight = weight / self._denominator(weight, labels != ignore_index, reduction, num_items)
        self.check_tail(tail, head)
        options: dict[str, Any] = {"ignore_index": ignore_index, "impl": impl, "memory_budget": memory_budget}
        if tail:
            options["tail"] = tail
        loss, stats = self.per_token(hidden, head, labels, weight, teacher, observe, reduction == "none", options)
        return loss.to(stats.lse.dtype), stats

    def per_token(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        weight: Tensor,
        teacher: Payload | None,
        observe: tuple[str, ...],
        unreduced: bool,
        options: dict[str, Any],
    ) -> tuple[Tensor, Stats]:
        """The weighted sum (or, unreduced, the weighted losses in the shape of labels) and detached statistics."""
        second = self.second(head, labels, teacher)
        return vocab_loss(
            self,
            hidden,
            head,
            labels,
            token_weight=weight,
            observe=observe,
            payload=second,
            unreduced=unreduced,
            **options,
        )

    def check_tail(self, tail: float, head: Head | None = None) -> None:
        """Refuse a sparse gradient for a loss that has none, with a ValueError that names the remedy."""
        check_tail(tail, self, head)
        if tail and type(self).per_token is not Loss.per_token:
            raise ValueError(
                f"tail is {tail} but {type(self).__name__} is more than a sum over tokens of functions of log p, and"
                " only such losses have a sparse gradient: pass tail=0"
            )

    @staticmethod
    def _weighted(loss: Tensor, weight: Tensor, stats: Stats, unreduced: bool) -> tuple[Tensor, Stats]:
        """What `per_token` returns, from losses [...] that are 0 at ignored positions; for those who override it."""
        stats = stats.detach()
        stats.values["loss"] = loss.detach()
        weighted = loss * torch.where(stats.mask, weight, 0)
        return weighted if unreduced else weighted.sum(), stats

    @staticmethod
    def _denominator(weight: Tensor, mask: Tensor, reduction: str, num_items: Tensor | float | None) -> Tensor | float:
        if num_items is not None:
            return num_items.to(weight.device) if isinstance(num_items, Tensor) else num_items
        if reduction == "sum":
            return 1.0
        total = torch.where(mask, weight, 0).sum()
        return torch.where(total == 0, 1.0, total)

    def describe(self) -> dict[str, Any]:
        """The loss as JSON: its registry key under 'loss' and its fields; tensors appear as their shape."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # subclasses are dataclasses
        shown = {k: f"tensor{list(v.shape)}" if isinstance(v, Tensor) else v for k, v in values.items()}
        return {"loss": type(self).__module__.rsplit(".", 1)[-1], **shown}

"""`Loss`, the base of all objectives: a frozen dataclass that turns statistics of tokens into losses in nats.

A loss of the statistics alone writes `of` and `uses`. One that compares with a second head (a teacher, unit
embeddings) also writes `second`. One that is not a function of statistics at all overrides `per_token`. Everything else
(reduction, token weights, backends, memory, logits that already exist) is implemented here.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from ..ops import Head, Payload, Stats, dense_stats
from ..ops.dispatch import check_tail, stream_loss
from ..ops.panels import Matrix
from ..ops.request import Request
from ..ops.rows import token_ids
from ..ops.statistics import wide
from .reduction import Reduction


class Loss:
    """Base of every objective. Subclasses are frozen dataclasses; their fields are their hyper-parameters."""

    uses: tuple[str, ...] = ("lse", "target")  # the statistics that `of` differentiates, exactly these
    linear = False  # whether `of` is linear in these statistics; then `slopes(labels)` has its derivatives by each
    needs_teacher = False  # whether `teacher=(hidden, head)` must be passed

    def of(self, stats: Stats) -> Tensor:
        """The loss of every token from its statistics.

        Args:
            stats: The statistics named in `uses`, [N] each.

        Returns:
            Losses [N], nats.
        """
        raise NotImplementedError

    def reference(self, logits: Tensor, labels: Tensor, **second: Tensor) -> Tensor:
        """The paper's formula on dense logits, written independently of `of`, for tests.

        Args:
            logits: [N, V].
            labels: Token ids [N]. N tokens are one sequence where that matters.
            **second: Further inputs of the formula: `weight`, the head's [V, D], and `teacher`, the teacher's dense
                logits [N, V]. Callers pass all they have, and a loss takes what it needs.

        Returns:
            Losses [N], nats.
        """
        raise NotImplementedError

    def second(self, head: Head, labels: Tensor, teacher: Payload | None) -> Payload | None:
        """The second head; `stats.payload` is the expectation of its logits.

        Args:
            head: The head under whose softmax the expectation is taken.
            labels: Token ids [...].
            teacher: (hidden [..., D2], head), if the caller passes one.

        Returns:
            Hidden states [..., D2] and a head of the same V, or None for a loss without a payload.
        """
        return None

    def on_labels(self, labels: Tensor, valid: Tensor, size: int, reduction: Reduction) -> tuple[Loss, Reduction]:
        """The loss and its reduction for one call, before anything is streamed; by default as they are.

        Args:
            labels: Token ids [...].
            valid: Which of them are not ignored, [...].
            size: The number of tokens of the vocabulary, V.
            reduction: What the caller asked for.

        Returns:
            A loss with the same `uses`, and a reduction.
        """
        return self, reduction

    def bind(self, weight: Matrix) -> Loss:
        """The loss with what it needs of the pretrained head stored in its fields.

        Args:
            weight: The head's, [V, D].

        Returns:
            A copy, or by default the loss itself.
        """
        return self

    def __call__(self, hidden: Tensor, head: Head, labels: Tensor, **options: Any) -> Tensor:
        """The reduced loss alone; parameters and errors as in `compute`."""
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
        teacher: Any = None,
        observe: tuple[str, ...] = (),
        ignore_index: int = -100,
        impl: str | None = None,
        memory_budget: int | None = None,
        tail: float = 0.0,
    ) -> tuple[Tensor, Stats]:
        """The loss over all tokens with a label, and their statistics, without logits.

        Args:
            hidden: The hidden states that the head is applied to, [..., D].
            head: The head.
            labels: Token ids [...], aligned with `hidden`.
            reduction: 'mean' divides the weighted sum by the sum of weights (0 if there is no token), 'sum', or 'none'
                for [...] with 0 at ignored positions.
            num_items: The divisor of the sum in place of the sum of weights: the number of tokens of the whole
                accumulated batch, as transformers' Trainer counts it.
            token_weight: Weights [...], constant.
            teacher: (hidden [..., D2], head) of the model to compare with, for losses that need one; or what else
                `hf_xent.losses.targets` has.
            observe: Names of further statistics to return.
            ignore_index: The label of positions to ignore.
            impl: 'reference', 'chunked' or 'triton', as in `hf_xent.vocab_stats`. Losses of whole rows (all with a
                teacher) are computed in one way, whatever it is.
            memory_budget: Bytes of logits in memory at a time, as in `hf_xent.vocab_stats`.
            tail: Relative error allowed in the gradient of the logits, as in `hf_xent.vocab_loss`; 0 is exact.

        Returns:
            The loss, nats, and the tokens' detached statistics in the shape of labels, with each one's `loss`.

        Raises:
            ValueError: The reduction is unknown, the teacher is missing, the loss has no sparse gradient for `tail`, or
                `hf_xent.vocab_stats` refuses the operands.
        """
        reduce = Reduction(reduction, num_items, token_weight)
        request = Request(observe, ignore_index, impl, memory_budget, tail)
        return self.reduced(hidden, head, labels, request, reduce, teacher)

    def reduced(
        self,
        hidden: Tensor,
        head: Head,
        labels: Tensor,
        request: Request,
        reduction: Reduction,
        teacher: Any = None,
    ) -> tuple[Tensor, Stats]:
        """`compute` with a request for its keywords; the reduction decides whether losses stay unreduced."""
        labels = token_ids(labels)
        if self.needs_teacher and teacher is None:
            raise ValueError(f"{type(self).__name__} compares with a teacher: pass teacher=(hidden, head)")
        valid = labels != request.ignore_index
        objective, reduction = self.on_labels(labels, valid, head.vocabulary, reduction)
        weight = reduction.weights(labels, valid, wide(hidden.dtype))
        self.check_tail(request.tail, head)
        request = replace(request, unreduced=reduction.unreduced)
        loss, stats = objective.per_token(hidden, head, labels, weight, teacher, request)
        return loss.to(stats.lse.dtype), stats

    def per_token(
        self, hidden: Tensor, head: Head, labels: Tensor, weight: Tensor, teacher: Payload | None, request: Request
    ) -> tuple[Tensor, Stats]:
        """The weighted sum (or, unreduced, the weighted losses in the shape of labels) and detached statistics."""
        return stream_loss(self, hidden, head, labels, request, weight, self.second(head, labels, teacher))

    def on_logits(
        self,
        logits: Tensor,  # [..., C]
        labels: Tensor,  # [...]
        *,
        reduction: str = "mean",
        num_items: Tensor | float | None = None,
        token_weight: Tensor | None = None,  # [...], constant
        ignore_index: int = -100,
    ) -> Tensor:
        """The loss of logits that already exist, for classifiers and segmenters, by plain torch operations.

        Args:
            logits: [..., C], classes last: move them there from [B, C, H, W].
            labels: Class ids [...].
            reduction: 'mean', 'sum' or 'none', as in `compute`.
            num_items: The divisor of the sum in place of the sum of weights.
            token_weight: Weights [...], constant.
            ignore_index: The label of positions to ignore.

        Returns:
            The loss, nats, in float32 or float64; differentiable any number of times.

        Raises:
            ValueError: The reduction is unknown, shapes do not fit, labels are not class ids, or the loss needs more
                than logits and labels.
        """
        if self.needs_teacher:
            raise ValueError(
                f"{type(self).__name__} compares with a teacher, which on_logits does not take: call the loss on hidden"
                " states, with teacher=(hidden, head)"
            )
        reduce, labels = Reduction(reduction, num_items, token_weight), token_ids(labels)
        if token_weight is not None and token_weight.ndim and token_weight.shape != labels.shape:
            raise ValueError(
                f"token_weight has shape {tuple(token_weight.shape)} but labels {tuple(labels.shape)}: pass one weight"
                " per label"
            )
        outputs = {"lse", "target", *self.uses} - {"payload"}
        stats = dense_stats(logits, labels, outputs=tuple(sorted(outputs)), ignore_index=ignore_index)
        objective, reduce = self.on_labels(labels, stats.mask, logits.shape[-1], reduce)
        weight = reduce.weights(labels, stats.mask, stats.lse.dtype)
        loss = objective.of_logits(logits, stats) * weight.expand(labels.shape)[stats.mask]
        loss = stats.lse.new_zeros(labels.shape).masked_scatter(stats.mask, loss) if reduce.unreduced else loss.sum()
        return loss.to(stats.lse.dtype)

    def of_logits(self, logits: Tensor, stats: Stats) -> Tensor:
        """Losses of the N valid tokens, in reading order, from logits [..., V] and their statistics [...]."""
        return self.of(select_valid(stats))

    def check_tail(self, tail: float, head: Head | None = None) -> None:
        """Raise an error if a sparse gradient is requested of a loss that has none.

        Args:
            tail: Relative error allowed in the gradient of the logits; 0 is exact.
            head: The head, if it is known.

        Raises:
            ValueError: The loss, or the head, has no sparse gradient; the message names the remedy.
        """
        check_tail(tail, self, head)
        if tail and type(self).per_token is not Loss.per_token:
            raise ValueError(
                f"tail is {tail} but {type(self).__name__} is more than a sum over tokens of functions of log p, and"
                " only such losses have a sparse gradient: pass tail=0"
            )

    def describe(self) -> dict[str, Any]:
        """The loss as a dictionary for JSON.

        Returns:
            Its registry key under 'loss' and its fields; tensors appear as their shape.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # subclasses are dataclasses
        shown = {k: f"tensor{list(v.shape)}" if isinstance(v, Tensor) else v for k, v in values.items()}
        return {"loss": type(self).__module__.rsplit(".", 1)[-1], **shown}


def apply_weights(loss: Tensor, weight: Tensor, stats: Stats, request: Request) -> tuple[Tensor, Stats]:
    """The result of `Loss.per_token`, from losses [...] that are 0 at ignored positions; for its overrides."""
    stats = stats.detach()
    stats.values["loss"] = loss.detach()
    losses = loss * torch.where(stats.mask, weight, 0)
    return losses if request.unreduced else losses.sum(), stats


def select_valid(stats: Stats) -> Stats:
    """The statistics of the tokens with a label, [N] each."""
    values = {name: value[stats.mask] for name, value in stats.values.items()}
    return Stats(values, stats.labels[stats.mask], stats.mask[stats.mask])

"""One call of a patched model: whether its head is lazy, what is recorded on the way, and what is returned.

Threads and replicas of a model have separate calls, so the current one is kept in a context variable and not on the
model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..lazy import (
    OBJECTIVE,
    LazyLogits,
    Objective,
    PatchState,
    TracedLogits,
    check_sequences,
    next_token_labels,
    weighting,
)
from ..losses.base import Loss
from ..losses.reduction import Reduction
from ..ops import Head, Stats
from ..ops.rows import token_ids
from .split_sequences import refuse_unshifted
from .trl import FusedCall, FusedHead

COMPILED = "torch.compile traces the model (torch_compile=True)"
TRANSFORMED = "the model runs under torch.func or forward-mode differentiation, which lazy logits do not support"
_WITHOUT_LABELS = "the model was called without labels, so its loss is computed outside: pass always=True"
OUTSIDE_OF_MODEL = (
    "the head was called outside of a call of the patched model: something kept the forward from before the patch, or"
    " calls the head itself"
)
_REPLACED = (
    "the head's own forward was not called: an adapter on the head multiplies by itself, or torch.compile traced the"
    " model (torch_compile=True)"
)


class Patch(Protocol):
    """The patch on a model, as calls and hooks use it (`installation.Installation`)."""

    state: PatchState
    previous_forward: Any
    fused: FusedHead | None
    traced: bool  # whether the head has to return lazy logits to the program that torch.compile traces now

    @property
    def always(self) -> int:
        """How many callers need lazy logits without labels."""

    def make_heads_lazy(self, inner: nn.Module) -> None:
        """Put lazy forwards on the head as it is now."""

    def take_over_fused_head(self, inner: nn.Module) -> None:
        """Take TRL's forward off the model, if there is one."""


def patch_on(model: nn.Module) -> Patch | None:
    """The patch on a model without wrappers, or None."""
    return model.__dict__.get("_hf_xent")


@dataclass(eq=False)
class Call:
    """A call of a patched model in progress; each thread has its own, and each replica."""

    model: nn.Module
    patch: Patch
    outer: Call | None  # the call within which it happens
    lazy_now: bool = False  # whether the head has to return lazy logits
    scored: bool = True  # whether the objective has computed the loss, or does not have to
    objective: Objective | None = None  # the objective, for the cross-entropies that the model computes itself
    entered: bool = False  # whether the model's forward has begun
    lazy: bool = False  # whether the head returned lazy logits
    reason: str = ""  # why it did not
    fused: FusedCall | None = None  # the call of TRL's fused head, if it is one
    weights: weighting.TokenWeights | None = None  # of its labels, if it was given any

    @classmethod
    def begin(cls, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Make the head lazy for this call if it has labels, or if the patch is always lazy.

        Returns the arguments for the model itself.
        """
        patch: Patch = model.__dict__["_hf_xent"]
        call = cls(model, patch, CALL.get())
        CALL.set(call)
        weighting.CURRENT.set(None)
        patch.make_heads_lazy(model)
        patch.state.training = model.training
        patch.take_over_fused_head(model)
        model_class: Any = type(model)
        labeled = has_labels(parameters_of(model_class), args, kwargs)
        if labeled:
            refuse_unshifted(model, kwargs)
        call.lazy_now = labeled or patch.always > 0
        objective = objective_of(model)
        call.scored = objective is None or not labeled
        call.objective = None if objective is None else Objective(objective.loss, patch.state)
        OBJECTIVE.set(call.objective)
        if kwargs.get(weighting.NAME) is not None:
            call.weights = _weights_of(kwargs[weighting.NAME], _labels_of(model, args, kwargs), patch.state)
            weighting.CURRENT.set(call.weights)
        kwargs = {name: value for name, value in kwargs.items() if name != weighting.NAME}
        if not kwargs.get("fused_lm_head"):
            return kwargs
        if objective is not None:
            raise RuntimeError(
                f"the model is patched with {objective.loss!r}, but TRL's trainer takes its loss from"
                " log-probabilities (fused_lm_head=True), so it would have no effect: patch without a loss, or use"
                " hf_xent.XentTrainer"
            )
        call.fused = FusedCall.of(model, patch.fused, kwargs)
        return call.fused.kwargs

    @classmethod
    def end(cls, model: nn.Module, output: Any) -> Any:
        """The output for the caller; None if the model failed. Raises: RuntimeError if the objective was not used."""
        call = CALL.get()
        if call is None or call.model is not model:
            return output
        CALL.set(call.outer)
        OBJECTIVE.set(None if call.outer is None else call.outer.objective)
        weighting.CURRENT.set(None if call.outer is None else call.outer.weights)
        if output is None:
            return None
        state = call.patch.state
        if not call.lazy and (call.lazy_now or (model.training and torch.is_grad_enabled())):
            state.bypass(call.reason or (_REPLACED if call.lazy_now else _WITHOUT_LABELS))
        if call.weights is not None and not call.weights.used:
            raise RuntimeError(f"{weighting.NAME} had no effect: {call.why_unweighted()}")
        if call.fused is not None:
            return call.fused.answer(output)
        objective = objective_of(model)
        if objective is not None and not (call.scored or (call.objective and call.objective.used)):
            raise RuntimeError(unused(model, objective))
        return output

    @property
    def float32(self) -> bool:
        """Whether the head multiplies in float32: in a call of TRL's fused head that asks for it."""
        return self.fused is not None and self.fused.head.cast_lm_head_to_fp32

    def why_unweighted(self) -> str:
        """Why no loss of this call has asked for its token weights, and what to do."""
        if self.fused is not None:
            return "TRL's trainer takes its loss from log-probabilities: use hf_xent.trainers.StreamedSFTTrainer"
        if not self.lazy:
            return f"{self.reason or _REPLACED}: change that, or leave the weights out"
        return "the model computes its own loss: call it with always=True and no labels, and weigh that of out.logits"

    @staticmethod
    def current(patch: Patch) -> Call | None:
        """The innermost call of this thread of the model that has this patch, or None."""
        call = CALL.get()
        while call is not None and call.patch is not patch:
            call = call.outer
        return call


CALL: ContextVar[Call | None] = ContextVar("CALL", default=None)  # the innermost one of this thread


def objective_of(model: nn.Module) -> ModelLoss | None:
    """The objective that is set on a model now: a replica has its own, and a user may have set another loss since."""
    module = model._modules.get("_loss_function")
    return module if isinstance(module, ModelLoss) else None


def has_labels(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call has labels of any kind (models of speech have `text_labels` and others).

    `names` are the parameters of the model's forward.
    """
    passed = (*zip(names[: len(args)], args, strict=True), *kwargs.items())
    return any(name.endswith("labels") and value is not None for name, value in passed)


@lru_cache(maxsize=64)  # every call of a model asks, and to inspect a signature takes longer than all else here
def parameters_of(model_class: Any) -> tuple[str, ...]:
    """The names of the parameters of a model's forward."""
    return tuple(inspect.signature(model_class.forward).parameters)[1:]


def unused(model: nn.Module, objective: ModelLoss) -> str:
    """The error of an objective that a model's loss did not use."""
    return (
        f"{type(model).__name__} computed its loss without a cross-entropy of its head's logits, so {objective.shown}"
        " had no effect: call the model with patch(model, always=True) and without labels, and apply the loss to"
        " out.logits"
    )


def _labels_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The labels of a call by the name of their argument, `labels` or `shift_labels`."""
    model_class: Any = type(model)
    names = parameters_of(model_class)
    passed = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: passed[name] for name in ("labels", "shift_labels") if passed.get(name) is not None}


def _weights_of(values: Any, labels: dict[str, Any], state: PatchState) -> weighting.TokenWeights:
    """The weights of a call's labels. Raises: ValueError if there are no labels, or they have another shape."""
    if not labels:
        raise ValueError(f"{weighting.NAME} is given without labels: pass both, or weigh the loss of out.logits")
    own = next(iter(labels.values()))  # `labels` goes first
    shifted = labels["shift_labels"] if len(labels) > 1 else None
    return weighting.TokenWeights(weighting.check_weights(values, own.shape), own, shifted, state)


class ModelLoss(nn.Module):
    """A `Loss` in place of a model's `loss_function`; its tensors follow the model's device and are never saved.

    It is not called by models that compute their cross-entropy themselves; see `hf_xent.lazy.objective`.
    """

    def __init__(self, loss: Loss, state: PatchState):
        super().__init__()
        self.loss, self.state = loss, state
        self.next_token = True  # whether labels are those of the next position, as `ForCausalLMLoss` reads them
        self.shown = repr(loss)  # torch.compile cannot trace the repr of a dataclass

    def forward(
        self,
        logits: Any,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """The mean loss of all labels, or the sum over `num_items_in_batch`, as in transformers' own functions."""
        traced = isinstance(logits, TracedLogits) and logits.values is None
        if not traced and (not isinstance(logits, LazyLogits) or logits.is_dense):
            raise RuntimeError(f"{self.shown} needs the head's hidden states, but {self._why_dense()}")
        if traced:
            self.state.traced_objective.used = True
        elif (call := CALL.get()) is not None:
            call.scored = True
        targets = shift_labels
        if targets is None:
            assert labels is not None  # models call it with one of them
            targets = next_token_labels(labels, ignore_index) if self.next_token else token_ids(labels)
        check_sequences(self.loss, logits.shape[:-1])
        targets = targets.to(logits.hidden.device).reshape(logits.shape[:-1])
        targets, weights = weighting.weigh(self.state, targets, ignore_index)
        request = replace(self.state.request, ignore_index=ignore_index)

        def compute(hidden: Tensor, head: Head) -> tuple[Tensor, Stats]:
            moved = None if weights is None else weights.to(hidden.device)
            reduction = Reduction(num_items=num_items_in_batch, token_weight=moved)
            return self.loss.reduced(hidden, head, targets.to(hidden.device), request, reduction)

        loss, stats = logits.with_head(compute)
        return self.state.counted(loss, stats)

    @staticmethod
    def _why_dense() -> str:
        if torch.compiler.is_compiling():
            return f"{COMPILED}: leave torch_compile off, or train with cross-entropy"
        call = CALL.get()
        if call is not None and call.lazy and not call.reason:
            return (
                "the logits were materialized before the loss (an adapter on the head, or an unusual operation after"
                " it): see hf-xent check"
            )
        reason = (call and call.reason) or _REPLACED
        return f"{reason}: change that, or train with cross-entropy"

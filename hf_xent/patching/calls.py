"""One call of a patched model: whether its head is lazy, what is recorded on the way, and what is returned.

Threads and replicas of a model have separate calls, so the current one is kept in a context variable and not on the
model.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..lazy import LazyLogits, PatchState, next_token_labels
from ..losses.base import Loss
from ..losses.reduction import Reduction
from .trl import FusedCall, FusedHead

_LABELS = ("labels", "shift_labels")
COMPILED = "torch.compile traces the model (torch_compile=True), and a traced model computes its logits"
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
    always: int
    previous_forward: Any
    fused: FusedHead | None

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
    entered: bool = False  # whether the model's forward has begun
    lazy: bool = False  # whether the head returned lazy logits
    reason: str = ""  # why it did not
    fused: FusedCall | None = None  # the call of TRL's fused head, if it is one

    @classmethod
    def begin(cls, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Make the head lazy for this call if it has labels, or if the patch is always lazy.

        Returns the arguments for the model itself.
        """
        patch: Patch = model.__dict__["_hf_xent"]
        call = cls(model, patch, CALL.get())
        CALL.set(call)
        patch.make_heads_lazy(model)
        patch.state.training = model.training
        patch.take_over_fused_head(model)
        labeled = _has_labels(model, args, kwargs)
        call.lazy_now = labeled or patch.always > 0
        objective = _objective_of(model)
        call.scored = objective is None or not labeled
        if not kwargs.get("fused_lm_head"):
            return kwargs
        if objective is not None:
            raise RuntimeError(
                f"the model is patched with {objective.loss!r}, but TRL's trainer takes its loss from"
                " log-probabilities (fused_lm_head=True), so it would have no effect: patch without a loss, or use"
                " hf_xent.XentTrainer"
            )
        call.fused = FusedCall.of(model, patch.fused, kwargs)
        return kwargs if call.fused is None else call.fused.kwargs

    @classmethod
    def end(cls, model: nn.Module, output: Any) -> Any:
        """The output for the caller; None if the model failed. Raises: RuntimeError if the objective was not used."""
        call = CALL.get()
        if call is None or call.model is not model:
            return output
        CALL.set(call.outer)
        if output is None:
            return None
        state = call.patch.state
        if not call.lazy and (call.lazy_now or (model.training and torch.is_grad_enabled())):
            state.bypass(call.reason or (_REPLACED if call.lazy_now else _WITHOUT_LABELS))
        if call.fused is not None:
            return call.fused.answer(output)
        objective = _objective_of(model)
        if objective is not None and not call.scored:
            raise RuntimeError(
                f"{type(model).__name__} computed its own loss and never called loss_function, so {objective.loss!r}"
                " had no effect: call the model with patch(model, always=True) and without labels, and apply the loss"
                " to out.logits"
            )
        return output

    @staticmethod
    def current(patch: Patch) -> Call | None:
        """The innermost call of this thread of the model that has this patch, or None."""
        call = CALL.get()
        while call is not None and call.patch is not patch:
            call = call.outer
        return call


CALL: ContextVar[Call | None] = ContextVar("CALL", default=None)  # the innermost one of this thread


def _objective_of(model: nn.Module) -> ModelLoss | None:
    """The objective that is set on a model now: a replica has its own, and a user may have set another loss since."""
    module = model._modules.get("_loss_function")
    return module if isinstance(module, ModelLoss) else None


def _has_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if any(kwargs.get(name) is not None for name in _LABELS):
        return True
    names = list(inspect.signature(type(model).forward).parameters)[1 : len(args) + 1]
    return any(name in _LABELS and value is not None for name, value in zip(names, args, strict=False))


class ModelLoss(nn.Module):
    """A `Loss` in place of a causal LM's `loss_function`; its tensors follow the model's device and are never saved."""

    def __init__(self, loss: Loss, state: PatchState):
        super().__init__()
        self.loss, self.state = loss, state
        self._shown = repr(loss)  # torch.compile cannot trace the repr of a dataclass

    def forward(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """The loss of next-token labels, as in `ForCausalLMLoss`: the mean, or the sum over `num_items_in_batch`."""
        if not isinstance(logits, LazyLogits) or logits.is_dense:
            raise RuntimeError(f"{self._shown} needs the head's hidden states, but {self._why_dense()}")
        call = CALL.get()
        if call is not None:
            call.scored = True
        targets = shift_labels
        if targets is None:
            assert labels is not None  # models call it with one of them
            targets = next_token_labels(labels, ignore_index)
        targets = targets.reshape(logits.shape[:-1])
        request = replace(self.state.request, ignore_index=ignore_index)
        reduction = Reduction(num_items=num_items_in_batch)
        loss, stats = logits.with_head(
            lambda hidden, head: self.loss.reduced(hidden, head, targets.to(hidden.device), request, reduction)
        )
        self.state.record(stats)
        return loss

    @staticmethod
    def _why_dense() -> str:
        if torch.compiler.is_compiling():
            return f"{COMPILED}: leave torch_compile off, or train with cross-entropy"
        call = CALL.get()
        if call is not None and call.lazy:
            return (
                "the logits were materialized before the loss (an adapter on the head, or an unusual operation after"
                " it): see hf-xent check"
            )
        reason = (call and call.reason) or _REPLACED
        return f"{reason}: change that, or train with cross-entropy"

"""`patch(model)`: the only place that knows how a model produces logits, and all it knows is its output embeddings.

The head's *instance* `forward` returns `LazyLogits` while the model is asked for a loss; the model's own forward runs
unchanged over them. No class and no global is touched, `unpatch` deletes what was set. Another objective is the model's
own `loss_function` (an official setter), a module that reads hidden states and head off the lazy logits.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import losses
from .comparison import Comparison, run_both_ways
from .lazy import LazyLogits, Seam, next_token_labels
from .losses import CrossEntropy, Loss

Model = TypeVar("Model", bound=nn.Module)
_LABELS = ("labels", "shift_labels")


def patch(  # noqa: PLR0913  one keyword a choice the user has
    model: Model,
    loss: str | Loss | None = None,
    *,
    observe: tuple[str, ...] = (),
    always: bool = False,
    impl: str | None = None,
    memory_budget: int | None = None,
    tail: float = 0.0,
    verify: bool = False,
) -> Model:
    """Make a causal LM compute its loss without logits, or another loss; returns the same model, changed in place.

    Called with labels, the model returns its loss and lazy `logits` that become real when touched; with `always`, also
    when called without labels (for losses computed outside the model). `loss` is a registry name or a
    `hf_xent.losses.Loss`; None keeps the model's own cross-entropy. `observe` names statistics to sum up beside the
    loss (see `Seam.take`). `tail` compresses the gradient of unlikely tokens (see `hf_xent.vocab_loss`). `verify` runs
    a few tokens both ways, without the tail, and refuses the model if they differ. Patching again replaces the earlier
    patch.

    Raises: ValueError for a model without a linear head, or for an unknown loss; RuntimeError if verification fails.
    """
    objective = losses.get(loss)
    if objective.needs_teacher:
        raise ValueError(
            f"loss is {loss!r}: it compares with a teacher, which a model's labels do not carry; call the loss itself"
        )
    objective.check_tail(tail)
    inner, head = _inner(model), head_of(model)
    objective = objective.bind(head.weight)
    unpatch(model)  # now that nothing can be refused any more
    seam = Seam(observe=tuple(observe), options={"impl": impl, "memory_budget": memory_budget}, tail=tail)
    forward = _LazyForward(head, seam, awake=always)
    head.forward = forward  # type: ignore[method-assign]  # on the instance: the class stays as it is
    asked = inner.register_forward_pre_hook(_Asked(forward), with_kwargs=True)
    answered = inner.register_forward_hook(_Answered(forward), always_call=True)
    inner.__dict__["_hf_xent"] = _Patch(seam, forward, (asked, answered), inner.__dict__.get("_loss_function"))
    if objective != CrossEntropy():
        forward.objective = ModelLoss(objective, seam)
        kind: Any = type(inner)  # transformers' own, so it has the property
        kind.loss_function.fset(inner, forward.objective)  # nn.Module.__setattr__ would shadow the property
    if verify:
        report = compare(model)
        if not report.equal:
            unpatch(model)
            raise RuntimeError(
                f"{report.model} does not compute the same loss when patched and was left as it was: {report}"
            )
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`; does nothing to a model that was not patched."""
    inner = _inner(model)
    state = inner.__dict__.pop("_hf_xent", None)
    if state is not None:
        for handle in state.hooks:
            handle.remove()
        state.forward.head.__dict__.pop("forward", None)
        if state.forward.objective is not None:
            del inner._loss_function
            if state.loss_function is not None:
                inner.loss_function = state.loss_function
    return model


def compare(model: nn.Module, *, tokens: int = 24) -> Comparison:
    """Loss and every parameter's gradient, stock against patched, on random tokens; leaves the model as it was.

    A model that is not patched is patched for the occasion. With another objective than cross-entropy, it is the
    model's own loss that is compared. Raises: as `patch`.
    """
    inner = _inner(model)
    patched = "_hf_xent" in inner.__dict__
    if not patched:
        patch(model)
    try:
        return run_both_ways(model, inner, inner.__dict__["_hf_xent"], tokens)
    finally:
        if not patched:
            unpatch(model)


def seam_of(model: nn.Module) -> Seam:
    """The counts and sums of a patched model. Raises: ValueError if it is not patched."""
    state = _inner(model).__dict__.get("_hf_xent")
    if state is None:
        raise ValueError(f"{type(model).__name__} is not patched: call hf_xent.patch(model) first")
    return state.seam


def head_of(model: nn.Module) -> nn.Linear:
    """The linear layer that makes a model's logits, inside whatever wraps it.

    Raises: ValueError if there is none, it is not a plain linear layer, or something else already replaced its forward.
    """
    name = type(_inner(model)).__name__
    get = getattr(_inner(model), "get_output_embeddings", None)  # absent on modules that are not transformers models
    head = get() if get else None
    if head is None:
        raise ValueError(
            f"model is a {name}, which has no output embeddings: pass a model with a language-modeling head"
        )
    while not isinstance(head, nn.Linear) and hasattr(head, "active_adapters"):  # PEFT: LoRA layers, modules_to_save
        saved = getattr(head, "modules_to_save", {})
        active = [a for a in head.active_adapters if a in saved]
        head = saved[active[0]] if active else getattr(head, "base_layer", None) or head.original_module
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(
            f"model is a {name} whose head is a {type(head).__name__}: only plain nn.Linear heads can be streamed"
        )
    if "forward" in head.__dict__ and not isinstance(head.__dict__["forward"], _LazyForward):
        raise ValueError(
            f"the head of {name} already has another forward ({head.forward!r}): remove that wrapper"
            " (device_map?) first"
        )
    return head


def _inner(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, torch.compile and PEFT wrappers."""
    inner: Any = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):  # torch.compile
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        else:
            return inner


class _LazyForward:
    """The head's forward while patched. An object, not a closure, so that copies of the model get copies of it."""

    def __init__(self, head: nn.Linear, seam: Seam, awake: bool):
        self.head, self.seam, self.always = head, seam, awake
        self.awake = awake  # whether the model was asked for a loss
        self.objective: ModelLoss | None = None

    def __call__(self, input: Tensor) -> Tensor:  # nn.Linear.forward's own parameter name
        head = self.head
        if not self.awake or torch.compiler.is_compiling():
            return F.linear(input, head.weight, head.bias)
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            bias = None if head.bias is None else head.bias.to(dtype)
            return LazyLogits.of(input.to(dtype), head.weight.to(dtype), bias, self.seam)
        return LazyLogits.of(input, head.weight, head.bias, self.seam)


class _Asked:
    """Before the model's forward: wakes the head if labels are given."""

    def __init__(self, forward: _LazyForward):
        self.forward = forward

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = self.forward
        forward.seam.training = model.training
        forward.awake = forward.always or _labels_given(model, args, kwargs)
        if forward.objective is not None:
            forward.objective.called = not _labels_given(model, args, kwargs)


class _Answered:
    """After the model's forward, even a failed one: puts the head back to sleep; a bypassed loss is an error."""

    def __init__(self, forward: _LazyForward):
        self.forward = forward

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        self.forward.awake = self.forward.always
        objective = self.forward.objective
        if objective is not None and not objective.called and output is not None:
            raise RuntimeError(
                f"{type(model).__name__} computed its own loss and never called loss_function, so {objective.loss!r}"
                " had no effect: call the model with patch(model, always=True) and without labels, and apply the loss"
                " to out.logits"
            )


def _labels_given(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if any(kwargs.get(name) is not None for name in _LABELS):
        return True
    names = list(inspect.signature(type(model).forward).parameters)[1 : len(args) + 1]
    return any(name in _LABELS and value is not None for name, value in zip(names, args, strict=False))


@dataclass
class _Patch:
    seam: Seam
    forward: _LazyForward
    hooks: tuple[Any, ...]
    loss_function: Any  # what the user had set before, or None


class ModelLoss(nn.Module):
    """A `Loss` in place of a causal LM's `loss_function`; its tensors follow the model's device and are never saved."""

    def __init__(self, loss: Loss, seam: Seam):
        super().__init__()
        self.loss, self.seam, self.called = loss, seam, False

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
        """The loss of next-token labels, as `ForCausalLMLoss`: the mean, or the sum over `num_items_in_batch`."""
        self.called = True
        if not isinstance(logits, LazyLogits) or logits.is_dense:
            raise RuntimeError(
                f"{self.loss!r} needs the head's hidden states, but the logits were materialized on their way (an"
                " adapter on the head, or an unusual operation after it): see hf-xent check"
            )
        targets = shift_labels
        if targets is None:
            assert labels is not None  # a model asks for a loss with labels of one kind or the other
            targets = next_token_labels(labels, ignore_index)
        loss, stats = self.loss.compute(
            logits.hidden,
            logits.head,
            targets.to(logits.device).reshape(logits.shape[:-1]),
            num_items=num_items_in_batch,
            ignore_index=ignore_index,
            observe=self.seam.observe,
            tail=self.seam.tail,
            **self.seam.options,
        )
        self.seam.record(stats)
        return loss

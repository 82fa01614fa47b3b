"""`patch(model)`: the only place that knows how a model produces logits, and all it knows is its output embeddings.

The head's *instance* `forward` returns `LazyLogits` while the model is asked for a loss; the model's own forward runs
unchanged over them. No class and no global is touched, `unpatch` deletes what was set. Another objective is the model's
own `loss_function` (an official setter), a module that reads hidden states and head off the lazy logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import losses
from .comparison import Comparison, run_both_ways
from .fused_head import FusedCall, FusedHead
from .lazy import LazyLogits, Seam, next_token_labels
from .losses import CrossEntropy, Loss
from .ops import Head, Shard

Model = TypeVar("Model", bound=nn.Module)
_LABELS = ("labels", "shift_labels")
_WRAPPED = ("module", "_fsdp_wrapped_module", "_orig_mod")  # what wrappers call the model in them


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
    weight: Any = head.weight
    objective = objective.bind(weight.full_tensor() if _is_split(weight) else weight)
    unpatch(model)  # now that nothing can be refused any more
    seam = Seam(observe=tuple(observe), options={"impl": impl, "memory_budget": memory_budget}, tail=tail)
    state = _Patch(seam, always, awake=always, loss_function=inner.__dict__.get("_loss_function"))
    state.install(inner)
    asked = inner.register_forward_pre_hook(_Asked(state), with_kwargs=True)
    answered = inner.register_forward_hook(_Answered(state), always_call=True)
    state.hooks = (asked, answered)
    state.take_over(inner)
    inner.__dict__["_hf_xent"] = state
    if objective != CrossEntropy():
        state.objective = ModelLoss(objective, seam)
        kind: Any = type(inner)  # transformers' own, so it has the property
        kind.loss_function.fset(inner, state.objective)  # nn.Module.__setattr__ would shadow the property
    if verify:
        report = compare(model)
        if not report.equal:
            unpatch(model)
            raise RuntimeError(
                f"{report.model} does not compute the same loss when patched and was left as it was: {report}"
            )
    return model


def ensure_patched(model: Model, **options: Any) -> Model:
    """`patch(model, **options)`, unless it is patched already: then, what TRL has put on it since is taken over.

    Raises: as `patch`.
    """
    state: _Patch | None = _inner(model).__dict__.get("_hf_xent")
    if state is None:
        return patch(model, **options)
    state.take_over(_inner(model))
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`; does nothing to a model that was not patched."""
    inner = _inner(model)
    state = inner.__dict__.pop("_hf_xent", None)
    if state is not None:
        for handle in state.hooks:
            handle.remove()
        state.uninstall()
        if state.fused is not None:
            state.fused.restore(inner)
        if state.objective is not None:
            del inner._loss_function
            if state.loss_function is not None:
                inner.loss_function = state.loss_function
    return model


@contextmanager
def lazily(model: nn.Module) -> Iterator[None]:
    """In here a patched model's logits are lazy without labels too, for losses computed outside of it.

    Raises: ValueError if the model is not patched.
    """
    seam_of(model)
    state: _Patch = _inner(model).__dict__["_hf_xent"]
    always, state.always = state.always, True
    try:
        yield
    finally:
        state.always = state.awake = always


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
    inner = _inner(model)
    name, head = type(inner).__name__, _linears(inner)[0]
    if type(head.weight) not in (nn.Parameter, Tensor) and not _is_split(head.weight):
        raise ValueError(
            f"model is a {name} whose head's weight is a {type(head.weight).__name__}: only plain weights can be"
            " streamed, leave the head out of the quantization"
        )
    forward = head.__dict__.get("forward")
    if not (
        forward is None or isinstance(forward, _LazyForward) or hasattr(head, "_hf_hook") or _is_split(head.weight)
    ):
        raise ValueError(f"the head of {name} already has another forward ({forward!r}): remove that wrapper first")
    return head


def _linears(inner: nn.Module) -> list[nn.Linear]:
    """The head, and the second halves of LoRA branches on it, whose products have the vocabulary's size too."""
    name = type(inner).__name__
    get: Any = getattr(inner, "get_output_embeddings", None)  # absent on modules that are not transformers models
    head = layer = get() if get else None
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
    branches = getattr(layer, "lora_B", {}).values()
    return [head, *(b for b in branches if isinstance(b, nn.Linear) and type(b).forward is nn.Linear.forward)]


def _is_split(weight: Tensor) -> bool:
    """Whether a weight is a DTensor."""
    return hasattr(weight, "placements")


def _local_head(linear: nn.Linear) -> Head | None:
    """A head over this rank's operands; None if it is not split by vocabulary along one dimension of the mesh."""
    weight: Any = linear.weight
    bias: Any = linear.bias
    if not _is_split(weight):
        return Head(weight, bias)
    split = [i for i, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if len(split) != 1 or not weight.placements[split[0]].is_shard(0):
        return None
    shard = Shard(weight.device_mesh.get_group(split[0]), 0, weight.shape[0])
    shard = replace(shard, start=weight.device_mesh.get_local_rank(split[0]) * shard.width)
    return Head(weight.to_local(), None if bias is None else bias.to_local(), shard=shard)


def _inner(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers."""
    inner: Any = model
    while True:
        wrapped = next((inner._modules[name] for name in _WRAPPED if inner._modules.get(name) is not None), None)
        if wrapped is not None:
            inner = wrapped
        elif hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        else:
            return inner


@dataclass
class _Patch:
    """What a patched model keeps: on the model, and shared by its hooks and its heads' forwards."""

    seam: Seam
    always: bool
    awake: bool  # whether the model was asked for a loss
    paused: bool = False  # the model runs stock
    hooks: tuple[Any, ...] = ()
    forwards: list[_LazyForward] = field(default_factory=list)
    objective: ModelLoss | None = None
    loss_function: Any = None  # what the user had set before, or None
    fused: FusedHead | None = None  # TRL's, once a trainer installed it
    asked: FusedCall | None = None  # a call of TRL's that is under way

    def install(self, inner: nn.Module) -> None:
        """Lazy forwards on the head as it is now: adapters, wrappers or a resize may have replaced it."""
        linears = _linears(inner)
        if [forward.linear for forward in self.forwards] == linears:
            return
        head_of(inner)  # refuses what cannot be streamed
        self.uninstall()
        self.forwards = [_LazyForward(linear, self) for linear in linears]

    def take_over(self, inner: nn.Module) -> None:
        """TRL's forward, if it has put one on the model, comes off: in a copy of the model it would run the original.

        It stays for what TRL has to do itself.
        """
        self.fused = FusedHead.installed(inner) or self.fused
        if self.fused is not None and not self.fused.cast_lm_head_to_fp32:
            FusedHead.remove(inner)

    def uninstall(self) -> None:
        """The heads' own forwards again."""
        for forward in self.forwards:
            forward.remove()
        self.forwards = []


class _LazyForward:
    """A head's forward while patched. An object, not a closure, so that copies of the model get copies of it."""

    def __init__(self, linear: nn.Linear, patch: _Patch):
        self.linear, self.patch = linear, patch
        # accelerate's hooks have taken the forward's place and call this one
        slot = "_old_forward" if hasattr(linear, "_hf_hook") else "forward"
        self.before = linear.__dict__.get(slot)  # tensor parallelism's, or none
        linear.__dict__[slot] = self

    def remove(self) -> None:
        """Put back what was there, unless something else has been put in its place since."""
        places = self.linear.__dict__
        if places.get("_old_forward") is self:  # accelerate came first, or afterwards
            places["_old_forward"] = self.before or MethodType(nn.Linear.forward, self.linear)
        elif places.get("forward") is self:
            del places["forward"]
            if self.before is not None:
                places["forward"] = self.before

    def __call__(self, input: Tensor) -> Tensor:  # nn.Linear.forward's own parameter name
        linear = self.linear
        awake = self.patch.awake and not torch.compiler.is_compiling() and type(input) is Tensor
        raw = _local_head(linear) if awake and _stays(linear) else None
        if raw is None:
            before: Any = self.before
            return nn.Linear.forward(linear, input) if before is None else before(input)
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            bias = None if raw.bias is None else raw.bias.to(dtype)
            input, raw = input.to(dtype), replace(raw, weight=raw.weight.to(dtype), bias=bias)
        return LazyLogits.of(input, raw, self.patch.seam)


def _stays(linear: nn.Linear) -> bool:
    """Whether the weight outlives the call, so that it can be read later; makes FSDP2 keep it until the backward."""
    keep: Any = getattr(linear, "set_reshard_after_forward", None)
    if keep is not None:  # sharded by FSDP2 on its own; the backward, which comes next, would gather it again
        keep(False, recurse=False)
    return not (hasattr(linear.weight, "ds_id") or getattr(getattr(linear, "_hf_hook", None), "offload", False))


class _Asked:
    """Before the model's forward: wakes the head if labels are given."""

    def __init__(self, patch: _Patch):
        self.patch = patch

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        patch = self.patch
        if patch.paused:
            return None
        patch.install(model)
        patch.seam.training = model.training
        patch.take_over(model)
        given = _labels_given(model, args, kwargs)
        patch.awake = patch.always or given
        if patch.objective is not None:
            patch.objective.called = not given
        if not kwargs.get("fused_lm_head"):
            return None
        if patch.objective is not None:
            raise RuntimeError(
                f"the model is patched with {patch.objective.loss!r}, but TRL's trainer takes its loss from"
                " log-probabilities (fused_lm_head=True), so it would have no effect: patch without a loss, or use"
                " hf_xent.XentTrainer"
            )
        patch.asked = FusedCall.of(model, patch.fused, kwargs)
        return None if patch.asked is None else (args, patch.asked.kwargs)


class _Answered:
    """After the model's forward, even a failed one: puts the head back to sleep; a bypassed loss is an error."""

    def __init__(self, patch: _Patch):
        self.patch = patch

    def __call__(self, model: nn.Module, args: Any, output: Any) -> Any:
        patch, call = self.patch, self.patch.asked
        patch.awake, patch.asked = patch.always and not patch.paused, None
        if call is not None:
            return None if output is None else call.answer(output)
        objective = patch.objective
        if objective is not None and not objective.called and output is not None:
            raise RuntimeError(
                f"{type(model).__name__} computed its own loss and never called loss_function, so {objective.loss!r}"
                " had no effect: call the model with patch(model, always=True) and without labels, and apply the loss"
                " to out.logits"
            )
        return None


def _labels_given(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if any(kwargs.get(name) is not None for name in _LABELS):
        return True
    names = list(inspect.signature(type(model).forward).parameters)[1 : len(args) + 1]
    return any(name in _LABELS and value is not None for name, value in zip(names, args, strict=False))


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
            targets.to(logits.hidden.device).reshape(logits.shape[:-1]),
            num_items=num_items_in_batch,
            ignore_index=ignore_index,
            observe=self.seam.observe,
            tail=self.seam.tail,
            **self.seam.options,
        )
        self.seam.record(stats)
        return loss

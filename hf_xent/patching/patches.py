"""`patch(model)`: a model's own forward runs unchanged over logits that are not computed.

The head's *instance* `forward` returns `LazyLogits` while the model is asked for a loss. That it is asked is noticed
where its forward begins: by hooks if it is called, by an instance `forward` if that is called past the hooks. No class
and no global is touched, `unpatch` deletes what was set. Another objective is the model's own `loss_function` (an
official setter), a module that reads hidden states and head off the lazy logits.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import losses
from ..lazy import LazyLogits, PatchState
from ..losses.base import Loss
from ..losses.cross_entropy import CrossEntropy
from ..ops.higher import composed
from ..ops.request import Request
from .calls import CALL, COMPILED, COMPOSED, OUTSIDE, Call, ModelLoss
from .comparison import Comparison, run_both_ways
from .heads import checked_head, fleeting, inner_of, is_split, linears_of, local_head
from .trl import FusedHead

Model = TypeVar("Model", bound=nn.Module)


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
    """Make a causal LM compute its loss without logits, or another loss; it is changed in place.

    Called with labels, the model returns its loss, and lazy `logits` that become real when they are touched. Patching
    again replaces the earlier patch. Where the head cannot be streamed (a compiled model, an offloaded head), the model
    computes its loss as it did before, and `hf_xent.patching.patch_state(model)` counts these calls and says why.

    Args:
        model: A transformers model with a language-modeling head, also inside the wrappers of PEFT, DDP or FSDP.
        loss: A registry name, with options after it as in 'focal:gamma=3', or a `hf_xent.losses.Loss`; None keeps the
            model's own cross-entropy.
        observe: Names of statistics to sum up beside the loss (see `PatchState.take`).
        always: Whether logits are lazy without labels too, for losses that are computed outside the model.
        impl: 'reference', 'chunked' or 'triton' (see `hf_xent.vocab_stats`).
        memory_budget: Bytes of logits alive at a time (see `hf_xent.vocab_stats`).
        tail: Relative error allowed to the gradient of the logits, which compresses that of unlikely tokens (see
            `hf_xent.vocab_loss`); 0 is exact.
        verify: Whether to run a few tokens both ways, without the tail, and to refuse the model if they differ.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no linear head, or the loss is unknown or needs a teacher.
        RuntimeError: The verification failed; the model is as it was.
    """
    objective = losses.get(loss)
    if objective.needs_teacher:
        raise ValueError(
            f"loss is {loss!r}: it compares with a teacher, which a model's labels do not carry; call the loss itself"
        )
    objective.check_tail(tail)
    weight: Any = head_of(model).weight
    if type(objective).bind is not Loss.bind:
        objective = objective.bind(weight.full_tensor() if is_split(weight) else weight)
    unpatch(model)  # now that nothing can be refused any more
    state = PatchState(Request(tuple(observe), impl=impl, memory_budget=memory_budget, tail=tail))
    installation = Installation(state, always=int(always))
    if objective != CrossEntropy():
        installation.objective = ModelLoss(objective, state)
    installation.put_on(model)
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
    installation = installation_of(inner_of(model))
    if installation is None:
        return patch(model, **options)
    installation.take_over(inner_of(model))
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch`; does nothing to a model that was not patched."""
    inner = inner_of(model)
    installation = installation_of(inner)
    if installation is not None:
        installation.take_off(inner)
    return model


@contextmanager
def unpatched(model: Model) -> Iterator[Model]:
    """In here a model is as it was before any patch; afterwards it has the same patch as before again, or none."""
    inner = inner_of(model)
    installation = installation_of(inner)
    unpatch(model)
    try:
        yield model
    finally:
        unpatch(model)  # whatever was patched meanwhile
        if installation is not None:
            installation.put_on(model)


@contextmanager
def patched(model: Model, loss: str | Loss | None = None, **options: Any) -> Iterator[Model]:
    """In here a model is patched with these options alone; afterwards it is as it was, whatever wraps it.

    A patch of the user's is set aside meanwhile, with its loss, counts and sums, and put back as it was; `impl` and
    `memory_budget` are the user's if not given. Raises: as `patch`.
    """
    installation = installation_of(inner_of(model))
    with unpatched(model):
        yield patch(model, loss, **({} if installation is None else installation.state.options) | options)


@contextmanager
def lazily(model: nn.Module) -> Iterator[None]:
    """In here a patched model's logits are lazy without labels too, for losses computed outside of it.

    Raises: ValueError if the model is not patched.
    """
    patch_state(model)
    installation: Any = installation_of(inner_of(model))
    installation.always += 1  # a count, for these contexts may overlap in any order
    try:
        yield
    finally:
        installation.always -= 1


def compare(model: nn.Module, *, tokens: int = 24) -> Comparison:
    """Loss and every parameter's gradient, stock against patched, on random tokens; leaves the model as it was.

    A model that is not patched is patched for the occasion. With another objective than cross-entropy, it is the
    model's own loss that is compared. Raises: as `patch`.
    """

    @contextmanager
    def streamed() -> Iterator[PatchState]:
        with patched(model):
            yield patch_state(model)

    return run_both_ways(model, lambda: unpatched(model), streamed, tokens)


def patch_state(model: nn.Module) -> PatchState:
    """The counts and sums of a patched model. Raises: ValueError if it is not patched."""
    installation = installation_of(inner_of(model))
    if installation is None:
        raise ValueError(f"{type(model).__name__} is not patched: call hf_xent.patch(model) first")
    return installation.state


def seam_of(model: nn.Module) -> PatchState:
    """The earlier name of `hf_xent.patching.patch_state`."""
    warnings.warn("seam_of is now hf_xent.patching.patch_state: use the new name", DeprecationWarning, stacklevel=2)
    return patch_state(model)


def head_of(model: nn.Module) -> nn.Linear:
    """The linear layer that makes a model's logits, inside whatever wraps it.

    Raises: ValueError if there is none, it is not a plain linear layer, or something else already replaced its forward.
    """
    return checked_head(inner_of(model), lambda forward: isinstance(forward, _LazyForward))


@dataclass
class Installation:
    """What a patched model keeps on itself. A replica of it has its own, with the same state."""

    state: PatchState
    always: int  # how many ask for lazy logits without labels
    objective: ModelLoss | None = None
    loss_function: Any = None  # what the user had set before, or None
    before: Any = None  # the forward that was on the model's instance, or None
    keepers: tuple[nn.Module, ...] = ()  # wrappers that kept the model's forward as their own
    hooks: tuple[Any, ...] = ()
    forwards: list[_LazyForward] = field(default_factory=list)
    fused: FusedHead | None = None  # TRL's, once a trainer installed it

    def put_on(self, model: nn.Module) -> None:
        """Onto a model without a patch."""
        inner = inner_of(model)
        self.install(inner)
        self.take_over(inner)
        before: Any = inner.__dict__.get("forward")
        self.before = None if _is_ours(before) else before
        kept = MethodType(type(inner).forward, inner)
        self.keepers = tuple(m for m in model.modules() if m is not inner and m.__dict__.get("forward") == kept)
        self.wrap(inner)
        asked = inner.register_forward_pre_hook(_asked, with_kwargs=True)
        self.hooks = (asked, inner.register_forward_hook(_answered, always_call=True))
        inner.__dict__["_hf_xent"] = self
        if self.objective is not None:
            self.loss_function = inner.__dict__.get("_loss_function")
            kind: Any = type(inner)  # transformers' own, so it has the property
            kind.loss_function.fset(inner, self.objective)  # nn.Module.__setattr__ would shadow the property

    def take_off(self, inner: Any) -> None:
        """Leaves the model as it was before `put_on`."""
        places = inner.__dict__
        for name in ("_hf_xent", "_replicate_for_data_parallel"):
            del places[name]
        for handle in self.hooks:
            handle.remove()
        self.uninstall()
        for slot in ("forward", "_old_forward"):  # accelerate came afterwards if it is the second
            if _is_ours(places.get(slot)):
                del places[slot]
                if self.before is not None or slot == "_old_forward":
                    places[slot] = self.before or MethodType(type(inner).forward, inner)
        for keeper in self.keepers:
            keeper.__dict__["forward"] = MethodType(type(inner).forward, inner)
        if self.fused is not None:
            self.fused.restore(inner, self.before)
        if self.objective is not None and inner._modules.get("_loss_function") is self.objective:
            del inner._loss_function
            if self.loss_function is not None:
                inner.loss_function = self.loss_function

    def wrap(self, inner: nn.Module) -> None:
        """The instance's forward, for those who call it past the hooks.

        They are PEFT's AdaLoRA, X-LoRA and adaption prompts (these keep it as they find it), and older PEFT.
        """
        forward = MethodType(_noticed(type(inner)), inner)
        for module in (inner, *self.keepers):
            module.__dict__["forward"] = forward
        inner.__dict__["_replicate_for_data_parallel"] = MethodType(_replicate_for_data_parallel, inner)

    def install(self, inner: nn.Module) -> None:
        """Lazy forwards on the head as it is now: adapters, wrappers or a resize may have replaced it."""
        linears = linears_of(inner)
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
        bound = getattr(inner.__dict__.get("forward"), "__func__", None)
        if "_hf_xent" in inner.__dict__ and bound in (None, type(inner).forward):  # an unpickled model has the latter
            self.wrap(inner)

    def uninstall(self) -> None:
        """The heads' own forwards again."""
        for forward in self.forwards:
            forward.remove()
        self.forwards = []

    def under_way(self) -> Call | None:
        """The call of the model in which this thread is, or None."""
        call = CALL.get()
        while call is not None and call.patch is not self:
            call = call.outer
        return call


class _LazyForward:
    """A head's forward while patched. An object, not a closure, so that copies of the model get copies of it."""

    def __init__(self, linear: nn.Linear, patch: Installation):
        self.linear, self.patch = linear, patch
        # accelerate's hooks have taken the forward's place and call this one
        slot = "_old_forward" if hasattr(linear, "_hf_hook") else "forward"
        before: Any = linear.__dict__.get(slot)  # tensor parallelism's, or none; a replica's still has the original's
        self.before: Any = before.before if isinstance(before, _LazyForward) else before
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
        raw = None if torch.compiler.is_compiling() or type(input) is not Tensor else self._head(input)
        if raw is None:
            before: Any = self.before
            return nn.Linear.forward(linear, input) if before is None else before(input)
        kind = input.device.type
        if torch.is_autocast_enabled(kind) and input.dtype != torch.float64:  # which autocast leaves alone
            dtype = torch.get_autocast_dtype(kind)
            bias = None if raw.bias is None else raw.bias.to(dtype)
            input, raw = input.to(dtype), replace(raw, weight=raw.weight.to(dtype), bias=bias)
        return LazyLogits.of(input, raw, self.patch.state)

    def _head(self, input: Tensor) -> Any:
        """The operands of lazy logits, or None if they are not wanted or cannot be."""
        call = self.patch.under_way()
        if not (self.patch.always if call is None else call.awake):
            if call is None and torch.is_grad_enabled():
                self.patch.state.bypass(OUTSIDE)
            return None
        reason = COMPOSED if composed(input, self.linear.weight) else fleeting(self.linear)
        raw = None if reason else local_head(self.linear)
        if raw is None:
            reason = reason or "the head's weight is split over ranks in another way than by the vocabulary"
        if call is not None:
            call.lazy, call.reason = call.lazy or raw is not None, reason
        return raw


def _asked(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the model is called."""
    patch = installation_of(model)
    if patch is None:
        return None
    if torch.compiler.is_compiling():
        patch.state.reason = COMPILED
        return None
    return args, Call.begin(model, args, kwargs)


def _answered(model: nn.Module, args: Any, output: Any) -> Any:
    """After the model was called, even in vain."""
    return None if torch.compiler.is_compiling() else Call.end(model, output)


def _noticed(kind: Any) -> Any:
    """A forward for instances of a class of models that runs its own, and notices if it was called past the hooks."""

    @functools.wraps(kind.forward)  # signatures are looked at
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        patch = installation_of(self)
        compiling = torch.compiler.is_compiling()
        if compiling and patch is not None and patch.fused is not None and kwargs.get("fused_lm_head"):
            return patch.fused.forward(*args, **kwargs)
        if patch is None or (compiling and patch.before is None):
            return kind.forward(self, *args, **kwargs)
        stock = patch.before or MethodType(kind.forward, self)
        if compiling:
            return stock(*args, **kwargs)
        call = CALL.get()
        if call is not None and call.model is self and not call.entered:
            call.entered = True
            try:
                return stock(*args, **kwargs)
            except Exception:  # the hook sees to it
                raise
            except BaseException:  # an interrupt runs no hooks
                Call.end(self, None)
                raise
        output = None
        try:
            kwargs = Call.begin(self, args, kwargs)
            output = stock(*args, **kwargs)
        finally:
            output = Call.end(self, output)
        return output

    return forward


_CODE = _noticed(nn.Module).__code__


def _is_ours(forward: Any) -> bool:
    return getattr(getattr(forward, "__func__", None), "__code__", None) is _CODE


def _replicate_for_data_parallel(self: Any) -> Any:
    """As `nn.Module`'s: replicas run in threads of their own, on heads of their own, so each has a patch of its own."""
    replica = type(self)._replicate_for_data_parallel(self)
    patch: Installation = self.__dict__["_hf_xent"]
    before = patch.before
    if getattr(before, "__self__", None) is self:
        before = MethodType(before.__func__, replica)
    own = replace(patch, before=before, keepers=(), forwards=[])  # on the replica's head once it has one
    replica.__dict__["_hf_xent"] = own
    own.wrap(replica)
    return replica


def installation_of(inner: nn.Module) -> Installation | None:
    """What `patch` has put on a model without wrappers, or None."""
    return inner.__dict__.get("_hf_xent")

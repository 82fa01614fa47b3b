"""The forwards of a patched model and its head: a call of the model is noticed, and the head returns lazy logits."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..lazy import LazyLogits
from ..lazy.source import changed
from ..ops import Head
from ..ops.higher import under_function_transform
from .calls import CALL, COMPILED, OUTSIDE_OF_MODEL, TRANSFORMED, Call, Patch, patch_on
from .gathered import FREED, Gathered, Source, unit_of, why_not_gathered
from .heads import forward_slot, keep_weight, local_head, tensor_of


class LazyForward:
    """A head's forward while patched. An object, not a closure, so that copies of the model get copies of it."""

    def __init__(self, linear: nn.Linear, patch: Patch):
        self.linear, self.patch = linear, patch
        self.gathered: Gathered | None = None  # the call in which its weight is there, if it is freed afterwards
        self.obstacle = ""  # why nothing can be computed in such a call
        slot = forward_slot(linear)
        previous: Any = linear.__dict__.get(slot)  # tensor parallelism's, or None; a replica still has the original's
        self.previous: Any = previous.previous if isinstance(previous, LazyForward) else previous
        linear.__dict__[slot] = self

    def remove(self) -> None:
        """Put back what was there, unless something else has been put in its place since."""
        if self.gathered is not None:
            self.gathered.remove()
        attributes = self.linear.__dict__
        if attributes.get("_old_forward") is self:  # accelerate wrapped it before or after the patch
            attributes["_old_forward"] = self.previous or MethodType(nn.Linear.forward, self.linear)
        elif attributes.get("forward") is self:
            del attributes["forward"]
            if self.previous is not None:
                attributes["forward"] = self.previous

    def gather_in(self, inner: nn.Module) -> None:
        """Take over the call in which the head's weight is there, as the model is wrapped now."""
        unit = unit_of(inner, self.linear)
        self.obstacle = why_not_gathered(inner, self.linear, unit)
        if self.gathered is not None and (self.gathered.unit is not unit or not self.gathered.is_installed):
            self.gathered.remove()
            self.gathered = None
        if unit is not None and self.gathered is None:
            self.gathered = Gathered(unit, self)

    def __call__(self, input: Tensor) -> Tensor:  # nn.Linear.forward's own parameter name
        """Lazy logits if the current call needs them, else the output of the forward that was there before."""
        linear = self.linear
        raw = None if torch.compiler.is_compiling() or type(input) is not Tensor else self._head(input)
        if raw is None:
            previous: Any = self.previous
            return nn.Linear.forward(linear, input) if previous is None else previous(input)
        return self._lazy(input, raw)

    def pending(self, hidden: Tensor, gathered: Gathered) -> LazyLogits | None:
        """Lazy logits of a head whose weight is there during its call only; None if they are not needed."""
        call = Call.current(self.patch)
        needed = self.patch.always if call is None else call.lazy_now
        if not needed or self.obstacle or under_function_transform(hidden, tensor_of(self.linear, "weight")):
            return None
        if call is not None:
            call.lazy = True
        return self._lazy(hidden, gathered.shape(), Source(gathered))

    def _lazy(self, input: Tensor, raw: Head, source: Source | None = None) -> LazyLogits:
        device_type = input.device.type
        if not torch.is_autocast_enabled(device_type) or input.dtype == torch.float64:  # which autocast leaves alone
            return LazyLogits.of(input, raw, self.patch.state, source=source)
        dtype = torch.get_autocast_dtype(device_type)
        raw, cast = raw.to(dtype), changed(source, lambda raw: raw.to(dtype))
        return LazyLogits.of(input.to(dtype), raw, self.patch.state, source=cast)

    def _head(self, input: Tensor) -> Head | None:
        """The head for lazy logits, or None if they are not needed or not possible; the reason is recorded."""
        call = Call.current(self.patch)
        if not (self.patch.always if call is None else call.lazy_now):
            if call is None and torch.is_grad_enabled():
                self.patch.state.bypass(OUTSIDE_OF_MODEL)
            return None
        transformed = under_function_transform(input, self.linear.weight)
        reason = TRANSFORMED if transformed else self.obstacle or (FREED if self.gathered else "")
        keep_weight(self.linear)
        raw = None if reason else local_head(self.linear)
        if raw is None:
            reason = reason or "the head's weight is split over ranks in another way than by the vocabulary"
        if call is not None:
            call.lazy, call.reason = call.lazy or raw is not None, reason
        return raw


def is_lazy(forward: Any) -> bool:
    """Whether a head's forward is a patch's."""
    return isinstance(forward, LazyForward)


def before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hook before a patched model is called."""
    patch = patch_on(model)
    if patch is None:
        return None
    if torch.compiler.is_compiling():
        patch.state.reason = COMPILED
        return None
    return args, Call.begin(model, args, kwargs)


def after_forward(model: nn.Module, args: Any, output: Any) -> Any:
    """The hook after a patched model was called, also if it failed."""
    return None if torch.compiler.is_compiling() else Call.end(model, output)


def noticing_forward(model_class: Any) -> Any:
    """A forward for instances of a model class: it runs that of the class, and notices calls that bypass the hooks."""

    @functools.wraps(model_class.forward)  # libraries inspect its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        patch = patch_on(self)
        compiling = torch.compiler.is_compiling()
        if compiling and patch is not None and patch.fused is not None and kwargs.get("fused_lm_head"):
            return patch.fused.forward(*args, **kwargs)
        if patch is None or (compiling and patch.previous_forward is None):
            return model_class.forward(self, *args, **kwargs)
        stock = patch.previous_forward or MethodType(model_class.forward, self)
        if compiling:
            return stock(*args, **kwargs)
        call = CALL.get()
        if call is not None and call.model is self and not call.entered:
            call.entered = True
            try:
                return stock(*args, **kwargs)
            except Exception:  # the hook ends the call
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


_CODE = noticing_forward(nn.Module).__code__


def is_noticing(forward: Any) -> bool:
    """Whether a model's forward is a patch's."""
    return getattr(getattr(forward, "__func__", None), "__code__", None) is _CODE

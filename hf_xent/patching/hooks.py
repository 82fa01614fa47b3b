"""The forwards of a patched model and its head: a call of the model is noticed, and the head returns lazy logits."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..lazy import LazyLogits, Objective
from ..lazy.source import changed
from ..lazy.traced import dense
from ..lazy.weighting import NAME
from ..ops import Head
from ..ops.higher import under_function_transform
from .calls import (
    CALL,
    COMPILED,
    OUTSIDE_OF_MODEL,
    TRANSFORMED,
    Call,
    Patch,
    has_labels,
    objective_of,
    parameters_of,
    patch_on,
    unused,
)
from .forwards import OwnForward, lazy_product
from .gathered import FREED, Gathered, Source, unit_of, why_not_gathered
from .heads import is_split, keep_weight, local_head, tensor_of
from .quantized import compute_dtype
from .trl import is_float32_forward


class LazyForward(OwnForward):
    """The forward of a plain linear head while patched."""

    def __init__(self, layer: nn.Linear, patch: Patch):
        super().__init__(layer, patch)
        self.gathered: Gathered | None = None  # the call in which its weight is there, if it is freed afterwards
        self.obstacle = ""  # why nothing can be computed in such a call

    def remove(self) -> None:
        """Put back what was there, unless something else has been put in its place since."""
        if self.gathered is not None:
            self.gathered.remove()
        super().remove()

    def gather_in(self, inner: nn.Module) -> None:
        """Take over the call in which the head's weight is there, as the model is wrapped now."""
        unit = unit_of(inner, self.layer)
        self.obstacle = why_not_gathered(inner, self.layer, unit)
        if self.gathered is not None and (self.gathered.unit is not unit or not self.gathered.is_installed):
            self.gathered.remove()
            self.gathered = None
        if unit is not None and self.gathered is None:
            self.gathered = Gathered(unit, self)

    def __call__(self, input: Tensor) -> Tensor:  # nn.Linear.forward's own parameter name
        """Lazy logits if the current call needs them, else the output of the forward that was there before."""
        if torch.compiler.is_compiling():
            raw = self._traced_head()
        else:
            raw = None if type(input) is not Tensor else self._head(input)
        if raw is None:
            return self._dense(input)
        if isinstance(raw.weight, Tensor) or raw.fp32:
            return lazy_product(input, raw, self.patch.state)
        dtype = compute_dtype(self.layer, input)  # of a quantized head; float32 stays so under torch.autocast
        bias = None if raw.bias is None else raw.bias.to(dtype)
        raw = replace(raw, weight=raw.weight.to(dtype), bias=bias, fp32=dtype == torch.float32)
        return lazy_product(input.to(dtype), raw, self.patch.state).to(input.dtype)

    def pending(self, hidden: Tensor, gathered: Gathered) -> LazyLogits | None:
        """Lazy logits of a head whose weight is there during its call only; None if they are not needed."""
        call = Call.current(self.patch)
        needed = self.patch.always if call is None else call.lazy_now
        if not needed or self.obstacle or under_function_transform(hidden, tensor_of(self.layer, "weight")):
            return None
        if call is not None:
            call.lazy = True
        raw, source = gathered.shape(), Source(gathered)
        if not self._multiplies_in_float32():
            return lazy_product(hidden, raw, self.patch.state, source)
        in_float32 = changed(source, lambda raw: replace(raw, fp32=True))
        return lazy_product(hidden, replace(raw, fp32=True), self.patch.state, in_float32)

    def _traced_head(self) -> Head | None:
        """The head for lazy logits of a compiled program, or None if they are not needed or not possible."""
        if not self.patch.traced:
            return None
        head, reason = self.layer, self._why_freed()
        keep_weight(head)
        if not reason and is_split(head.weight):
            reason = "the head is split over ranks"
        if not reason and type(head.weight) not in (Tensor, nn.Parameter):
            reason = f"the head's weight is a {type(head.weight).__name__}"
        if not reason:
            return Head(head.weight, head.bias, fp32=self._multiplies_in_float32())
        self.patch.state.reason = f"{COMPILED}, where {reason}"
        return None

    def _why_freed(self) -> str:
        """Why the weight is not there after this call, and nothing is computed in a later one; empty if it is."""
        return self.obstacle or (FREED if self.gathered else "")

    def _dense(self, input: Tensor) -> Tensor:
        """The logits as the forward before makes them, but in float32 if the current call asks for that."""
        own = self.previous is not None or type(input) is not Tensor
        head = None if own or not self._multiplies_in_float32() else local_head(self.layer)
        return self.run(input) if head is None else replace(head, fp32=True).logits(input)

    def _head(self, input: Tensor) -> Head | None:
        """The head for lazy logits, or None if they are not needed or not possible; the reason is recorded."""
        call = Call.current(self.patch)
        if not (self.patch.always if call is None else call.lazy_now):
            if call is None and torch.is_grad_enabled():
                self.patch.state.bypass(OUTSIDE_OF_MODEL)
            return None
        transformed = under_function_transform(input, tensor_of(self.layer, "weight"))
        reason = TRANSFORMED if transformed else self._why_freed()
        keep_weight(self.layer)
        raw = None if reason else local_head(self.layer)
        if call is not None:
            call.lazy, call.reason = call.lazy or raw is not None, reason
        return replace(raw, fp32=True) if raw is not None and self._multiplies_in_float32() else raw

    def _multiplies_in_float32(self) -> bool:
        """Whether TRL asks for float32 products, on the head itself or in the current call."""
        call = None if torch.compiler.is_compiling() else Call.current(self.patch)
        return is_float32_forward(self.previous) or (call is not None and call.float32)


def is_lazy(forward: Any) -> bool:
    """Whether a head's forward is a patch's."""
    return isinstance(forward, LazyForward)


def before_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hook before a patched model is called."""
    patch = patch_on(model)
    if patch is None:
        return None
    if torch.compiler.is_compiling():
        if NAME in kwargs:
            raise RuntimeError(f"{NAME} is given, but {COMPILED}: leave torch_compile off, or the weights out")
        return None
    return args, Call.begin(model, args, kwargs)


def after_forward(model: nn.Module, args: Any, output: Any) -> Any:
    """The hook after a patched model was called, also if it failed."""
    return None if torch.compiler.is_compiling() else Call.end(model, output)


def noticing_forward(model_class: Any) -> Any:
    """A forward for instances of a model class: it runs that of the class, and notices calls that bypass the hooks."""
    names = parameters_of(model_class)

    @functools.wraps(model_class.forward)  # libraries inspect its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        patch = patch_on(self)
        compiling = torch.compiler.is_compiling()
        if compiling and patch is not None and patch.fused is not None and kwargs.get("fused_lm_head"):
            return patch.fused.forward(*args, **kwargs)
        if patch is None:
            return model_class.forward(self, *args, **kwargs)
        stock = patch.previous_forward or functools.partial(model_class.forward, self)
        if compiling:
            return traced_call(self, patch, stock, has_labels(names, args, kwargs), args, kwargs)
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


def traced_call(
    model: nn.Module, patch: Patch, forward: Any, labeled: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A call of a patched model while torch traces it, with lazy logits if it has labels, or if the patch is always
    lazy.

    In evaluation the caller gets logits as a tensor, as of any compiled model, unless the patch is always lazy.
    """
    state, objective = patch.state, objective_of(model)
    outer = patch.traced, state.traced_objective
    patch.traced, state.training = labeled or patch.always > 0, model.training
    current = state.traced_objective = None if objective is None else Objective(objective.loss, state)
    try:
        output = forward(*args, **kwargs)
    finally:
        patch.traced, state.traced_objective = outer
    if labeled and objective is not None and current is not None and not current.used:
        raise RuntimeError(unused(model, objective))
    if model.training or patch.always > 0:
        return output
    reason = state.reason
    if isinstance(output, tuple):
        output = tuple(dense(x) for x in output)
    else:
        for name, x in output.items():
            output[name] = dense(x)
    state.reason = reason  # logits that are returned are no reason for a loss
    return output


_CODE = noticing_forward(nn.Module).__code__


def is_noticing(forward: Any) -> bool:
    """Whether a model's forward is a patch's."""
    return getattr(getattr(forward, "__func__", None), "__code__", None) is _CODE


def wraps_noticing(forward: Any) -> bool:
    """Whether a model's forward is a library's around that of a patch, as accelerate leaves it after a training."""
    function = getattr(getattr(forward, "__func__", None), "__wrapped__", None)
    while function is not None:
        if getattr(function, "__code__", None) is _CODE:
            return True
        function = getattr(function, "__wrapped__", None)
    return False

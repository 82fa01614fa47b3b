"""The forwards of a patched model and its head: a call of the model is noticed, and the head returns lazy logits."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Head
from ..ops.higher import under_function_transform
from .calls import CALL, COMPILED, OUTSIDE_OF_MODEL, TRANSFORMED, Call, patch_on
from .forwards import OwnForward, lazy_product
from .heads import local_head, why_weight_is_freed
from .quantized import compute_dtype
from .trl import is_float32_forward


class LazyForward(OwnForward):
    """The forward of a plain linear head while patched."""

    def __call__(self, input: Tensor) -> Tensor:  # nn.Linear.forward's own parameter name
        """Lazy logits if the current call needs them, else the output of the forward that was there before."""
        raw = None if torch.compiler.is_compiling() or type(input) is not Tensor else self._head(input)
        if raw is None:
            return self._dense(input)
        if isinstance(raw.weight, Tensor) or raw.fp32:
            return lazy_product(input, raw, self.patch.state)
        dtype = compute_dtype(self.layer, input)  # of a quantized head; float32 stays so under torch.autocast
        bias = None if raw.bias is None else raw.bias.to(dtype)
        raw = replace(raw, weight=raw.weight.to(dtype), bias=bias, fp32=dtype == torch.float32)
        return lazy_product(input.to(dtype), raw, self.patch.state).to(input.dtype)

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
        transformed = under_function_transform(input, self.layer.weight)
        reason = TRANSFORMED if transformed else why_weight_is_freed(self.layer)
        raw = None if reason else local_head(self.layer)
        if raw is None:
            reason = reason or "the head's weight is split over ranks in another way than by the vocabulary"
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

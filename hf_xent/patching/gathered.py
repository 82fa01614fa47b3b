"""Heads whose weight is there only while they are called: DeepSpeed's ZeRO-3, FSDP and accelerate's offloading.

Their hooks around a layer's call gather its weight and free it. Such a head is not called for its lazy logits: they
have the shape that the layer would give, and a source (`hf_xent.lazy.source`). What is computed from them runs in one
call of the layer, in place of its forward, so that the hooks gather the weight for it. The hooks get its differentiable
results as the layer's output, and so gather the weight again for their backward.

A call of the layer, hooks included, is taken over by `_compiled_call_impl`, as `nn.Module.compile` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..lazy.operands import Operand, check, version
from ..lazy.source import Compute, map_tensors
from ..ops import Head
from ..ops.panels import Matrix
from .forwards import forward_slot
from .heads import is_freed, is_split, local_head, tensor_of

FREED = "the head's weight is there during its call only, and it was called with more than one positional argument"
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_LIBRARIES = ("deepspeed.", "torch.distributed.", "accelerate.")


@dataclass(eq=False)
class _Job:
    """A computation in the place of a head's forward."""

    linear: nn.Linear
    compute: Compute
    result: Any = None

    def __call__(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """The results that have a graph, as the output of the layer."""
        head = local_head(self.linear)
        expected = (self.linear.out_features, self.linear.in_features)
        if tuple(head.weight.shape) != expected:
            raise RuntimeError(
                f"the head's weight has shape {tuple(self.linear.weight.shape)} in its call, not {expected}: unpatch"
                " the model (hf_xent.unpatch), and report how it is wrapped"
            )
        self.result = self.compute(hidden, head)
        outputs: list[Tensor] = []

        def collect(x: Tensor) -> Tensor:
            if x.requires_grad:
                outputs.append(x)
            return x

        map_tensors(collect, self.result)
        return tuple(outputs)

    def with_outputs(self, outputs: tuple[Tensor, ...]) -> Any:
        """The result, with what the hooks have made of the layer's output."""
        rest = iter(outputs)
        return map_tensors(lambda x: next(rest) if x.requires_grad else x, self.result)


class HeadForward(Protocol):
    """The head's forward while patched, as a taken-over call uses it (`hooks.LazyForward`)."""

    layer: Any

    def pending(self, hidden: Tensor, gathered: Gathered) -> Any:
        """The head's lazy output, or None if it has to be computed."""


class Gathered:
    """The call of a layer that gathers the head's weight, taken over; an object, so that copies get copies of it."""

    def __init__(self, unit: nn.Module, forward: HeadForward):
        self.unit, self.linear, self.forward = unit, forward.layer, forward
        self.previous: Any = unit.__dict__.get("_compiled_call_impl")
        unit.__dict__["_compiled_call_impl"] = self

    @property
    def is_installed(self) -> bool:
        """Whether calls of the layer come here; copies and loaded models have lost it."""
        return self.unit.__dict__.get("_compiled_call_impl") is self

    def remove(self) -> None:
        """Put back what was there, unless something else has been put in its place since."""
        if self.is_installed:
            del self.unit.__dict__["_compiled_call_impl"]
            if self.previous is not None:
                self.unit.__dict__["_compiled_call_impl"] = self.previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's lazy output if it is needed, else what a call of the layer gives."""
        lone = args[0] if len(args) == 1 and not kwargs and type(args[0]) is Tensor else None
        output = None if lone is None or torch.compiler.is_compiling() else self.forward.pending(lone, self)
        if output is not None:
            return output
        call: Any = self.previous or self.unit._call_impl
        return call(*args, **kwargs)

    def run(self, hidden: Tensor, compute: Compute) -> Any:
        """The result of a computation, which a call of the layer runs in place of its forward."""
        job, attributes, slot = _Job(self.linear, compute), self.linear.__dict__, forward_slot(self.linear)
        before = attributes.get(slot)
        if isinstance(before, _Job):  # in such a call already, as for a sum of two products of this head
            head = local_head(self.linear)
            return compute(hidden.to(head.weight.device), head)
        attributes[slot] = job
        try:
            outputs = self.unit._call_impl(hidden)
        finally:
            if before is None:  # the model is not patched any more
                del attributes[slot]
            else:
                attributes[slot] = before
        return job.with_outputs(outputs)

    def shape(self) -> Head:
        """The head with meta tensors in place of its weights."""
        trains = any(parameter.requires_grad for parameter in self.unit.parameters())
        linear, dtype = self.linear, tensor_of(self.linear, "weight").dtype

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta", requires_grad=trains)

        bias = None if tensor_of(linear, "bias") is None else empty(linear.out_features)
        return Head(empty(linear.out_features, linear.in_features), bias)


@dataclass(eq=False)
class Source:
    """The source of one output of the head; it notices if the weights have changed since they were read first."""

    gathered: Gathered
    read: list[Operand] = field(default_factory=list)

    def __call__(self, hidden: Tensor, compute: Compute) -> Any:
        """As `hf_xent.lazy.source.Source`."""
        return self.gathered.run(hidden, lambda hidden, raw: compute(hidden, self.checked(raw)))

    def checked(self, raw: Head) -> Head:
        """The head. Raises: RuntimeError if it is not what it was."""
        named = [(name, x) for name, x in raw.tensors.items() if x is not None]
        if self.read:
            now = (replace(old, tensor=x, version=version(x)) for old, (_, x) in zip(self.read, named, strict=True))
            check(tuple(now), unread=False)
        else:
            self.read = [replace(Operand.of(name, x), tensor=x.new_empty(0)) for name, x in named]
        return raw


def unit_of(inner: nn.Module, linear: nn.Module) -> nn.Module | None:
    """The module whose call gathers a head's weight and frees it: the layer, or FSDP's wrapper around it; or None."""
    around = [m for m in fsdp_units(inner) if m._modules["_fsdp_wrapped_module"] is linear]
    if around:
        return around[0]
    return linear if is_freed(linear) else None


def fsdp_units(inner: nn.Module) -> Iterator[nn.Module]:
    """The wrappers of FSDP1 inside a model."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (m for m in (inner.modules() if distributed else ()) if m._modules.get("_fsdp_wrapped_module") is not None)


def why_not_gathered(inner: nn.Module, linear: nn.Module, unit: nn.Module | None) -> str:
    """Why nothing can be computed in a call of the layer; empty if it can, or if the weight is there anyway."""
    if unit is None:
        if any(linear in m.modules() for m in fsdp_units(inner)):
            return "FSDP frees the head together with other modules: wrap it alone, or leave it to the root"
        return ""
    if type(tensor_of(linear, "weight")) not in (Tensor, nn.Parameter):
        return "the head's weight is quantized, and freed after its call"
    hooks = [hook for m in {unit, linear} for name in _HOOKS for hook in getattr(m, name).values()]
    foreign = [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith(_LIBRARIES)]
    if foreign:
        return f"the head's weight is freed after its call, and it has a hook ({foreign[0]!r}), which needs its logits"
    return ""


def whole_weight(inner: nn.Module, linear: nn.Linear) -> Matrix:
    """The head's weight [V, D], for a loss that keeps a part of it; gathered if it is freed between calls.

    A DTensor if it is split over ranks by the vocabulary, panels if it is quantized.

    Raises: ValueError if it can be gathered in a call of the model only.
    """
    weight = tensor_of(linear, "weight")
    if is_split(weight):
        return weight
    if hasattr(weight, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    if is_freed(linear):  # by accelerate's hook, which loads it before a call
        hook: Any = linear._hf_hook
        hook.pre_forward(linear)
        weight = linear.weight.detach().clone()
        hook.post_forward(linear, None)
        return weight
    weight = local_head(linear).weight
    if tuple(weight.shape) != (linear.out_features, linear.in_features) or unit_of(inner, linear) is not None:
        raise ValueError("the loss keeps a copy of the head's weight, but FSDP has sharded it: patch the model before")
    return weight

"""A forward of ours on an instance of a layer: how it takes the place of the one that is there, and gives it back."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ..lazy import LazyLogits, PatchState, TracedLogits
from ..lazy.source import Source, changed
from ..ops import Head


class OwnForward:
    """A layer's forward while patched. An object, not a closure, so that copies of the model get copies of it."""

    def __init__(self, layer: Any, patch: Any):
        self.layer, self.patch = layer, patch
        slot = forward_slot(layer)
        previous: Any = layer.__dict__.get(slot)  # tensor parallelism's, or None; a replica still has the original's
        self.previous: Any = previous.previous if isinstance(previous, OwnForward) else previous
        layer.__dict__[slot] = self

    def gather_in(self, inner: Any) -> None:
        """Notice how the model `inner` is wrapped now, and so where the layer's weights are."""

    def remove(self) -> None:
        """Put back what was there, unless something else has been put in its place since."""
        attributes = self.layer.__dict__
        if attributes.get("_old_forward") is self:  # accelerate wrapped it before or after the patch
            attributes["_old_forward"] = self.previous or MethodType(type(self.layer).forward, self.layer)
        elif attributes.get("forward") is self:
            del attributes["forward"]
            if self.previous is not None:
                attributes["forward"] = self.previous

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the forward that was there before."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.layer).forward(self.layer, *args, **kwargs)


def forward_slot(layer: Any) -> str:
    """The attribute of a layer that has its own forward: accelerate's hooks take that one's place and call this one."""
    return "_old_forward" if hasattr(layer, "_hf_hook") else "forward"


def lazy_product(input: Tensor, raw: Head, state: PatchState, source: Source | None = None) -> Any:
    """The lazy twin of `F.linear`, with the casts that torch.autocast would make; for `source` see `LazyLogits.of`."""
    device_type = input.device.type
    outside = raw.fp32 or input.dtype == torch.float64  # which autocast leaves alone
    if torch.is_autocast_enabled(device_type) and not outside:
        dtype = torch.get_autocast_dtype(device_type)
        input, raw, source = input.to(dtype), raw.to(dtype), changed(source, lambda raw: raw.to(dtype))
    if torch.compiler.is_compiling():
        return TracedLogits.of(input, raw, state)
    return LazyLogits.of(input, raw, state, source=source)

"""A layer and all that follows it in float64, for a while: then what rounding is left comes from the layers below."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .heads import is_split, why_not_kept

_NARROWING = (Tensor.float, Tensor.half, Tensor.bfloat16)
_CASTS = (Tensor.to, Tensor.type, Tensor.type_as)


def is_plain(module: Any) -> bool:
    """Whether a layer's numbers can be had in float64 for a while: they lie here, whole, where there is float64."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    elsewhere = any(is_split(x) or x.is_meta or x.device.type == "mps" for x in tensors)
    return not elsewhere and not (hasattr(module, "weight") and why_not_kept(module))


@contextmanager
def in_float64(layer: nn.Module) -> Iterator[None]:
    """In here a layer computes in float64, and what follows it stays in it; gradients reach its own parameters."""
    registries: list[Any] = [registry for m in layer.modules() for registry in (m._parameters, m._buffers)]
    before = [registry.copy() for registry in registries]
    mode = _Widened()
    handle = layer.register_forward_pre_hook(mode.widen)
    try:
        for registry in registries:  # with numbers that are not leaves, so that the graph goes on to the parameters
            floats = {name: x.double() for name, x in registry.items() if x is not None and x.is_floating_point()}
            registry.update(floats)
        with mode:
            yield
    finally:
        handle.remove()
        for registry, tensors in zip(registries, before, strict=True):
            registry.update(tensors)


class _Widened(TorchFunctionMode):
    """Once a head was called, casts of float64 tensors to other floats leave them as they are: models cast logits."""

    begun = False

    def widen(self, linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """A head's arguments."""
        self.begun = True
        return (args[0].double(), *args[1:])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.begun and args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func in _NARROWING:
                return args[0]
            args = (args[0], *map(_widest, args[1:])) if func in _CASTS else args
            kwargs = {name: _widest(value) for name, value in kwargs.items()} if "dtype" in kwargs else kwargs
        return func(*args, **kwargs)


def _widest(argument: Any) -> Any:
    """An argument of a cast that names a float, with float64 in its place."""
    if isinstance(argument, torch.dtype) and argument.is_floating_point:
        return torch.float64
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.double()
    return argument

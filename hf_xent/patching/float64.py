"""A context that runs a layer and all that follows it in float64, so that only the layers below round."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .heads import is_freed, is_split

_NARROWING = (Tensor.float, Tensor.half, Tensor.bfloat16)
_CASTS = (Tensor.to, Tensor.type, Tensor.type_as)


def supports_float64(module: Any) -> bool:
    """Whether a layer can run in float64: its tensors are here, whole, and on a device that has float64."""
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    plain = (Tensor, nn.Parameter)  # not quantized
    unavailable = any(is_split(x) or type(x) not in plain or x.is_meta or x.device.type == "mps" for x in tensors)
    return not unavailable and not is_freed(module)


@contextmanager
def in_float64(layer: nn.Module) -> Iterator[None]:
    """In this context a layer and what follows it compute in float64; gradients reach the layer's own parameters."""
    registries: list[Any] = [registry for m in layer.modules() for registry in (m._parameters, m._buffers)]
    originals = [registry.copy() for registry in registries]
    mode = _KeepFloat64()
    handle = layer.register_forward_pre_hook(mode.widen)
    try:
        for registry in registries:  # the copies are not leaves: the graph goes on to the parameters
            floats = {name: x.double() for name, x in registry.items() if x is not None and x.is_floating_point()}
            registry.update(floats)
        with mode:
            yield
    finally:
        handle.remove()
        for registry, tensors in zip(registries, originals, strict=True):
            registry.update(tensors)


class _KeepFloat64(TorchFunctionMode):
    """Once the layer is called, casts from float64 to other floats are ignored, since models cast their logits."""

    begun = False

    def widen(self, linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """The layer's arguments with its input in float64, as a forward pre-hook."""
        self.begun = True
        return (args[0].double(), *args[1:])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.begun and args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func in _NARROWING:
                return args[0]
            args = (args[0], *map(_in_float64, args[1:])) if func in _CASTS else args
            kwargs = {name: _in_float64(value) for name, value in kwargs.items()} if "dtype" in kwargs else kwargs
        return func(*args, **kwargs)


def _in_float64(argument: Any) -> Any:
    """An argument of a cast, with float64 in place of any other float dtype."""
    if isinstance(argument, torch.dtype) and argument.is_floating_point:
        return torch.float64
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.double()
    return argument

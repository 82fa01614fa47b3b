"""What torch's functions do with their arguments, as far as a lazy tensor has to know: look at, write to, hand out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SCALARS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))
_PROPERTIES = (
    "shape dtype device requires_grad grad_fn is_leaf layout ndim is_cuda is_cpu is_sparse is_quantized is_meta"
    " is_nested _version _backward_hooks"
)
_METHODS = (
    "size dim ndimension numel nelement is_floating_point is_complex __len__ get_device"
    " stride is_contiguous element_size"
)
_HOOKS: Any = torch.Tensor._backward_hooks  # a descriptor of the class; torch's stub has what it holds on a tensor

COMMUTATIVE = {torch.add, torch.mul, torch.multiply, *(getattr(torch.Tensor, name) for name in ("add", "mul"))}
"""Functions of two tensors that give the same in either order: a lazy tensor's answer is looked up by the first."""
METADATA: set[Any] = {
    *torch.overrides.get_default_nowrap_functions(),
    *(getattr(torch.Tensor, name).__get__ for name in _PROPERTIES.split()),
    *(getattr(torch.Tensor, name) for name in _METHODS.split()),
    *(_HOOKS.__set__, torch.numel, torch.is_floating_point, torch.is_complex),
}
"""Functions that look at the wrapper alone."""
OF_WRAPPER = {_HOOKS.__get__, _HOOKS.__set__}
"""Those of them that never look at the dense values; the others do, once there are some."""
DIFFERENTIATING = {torch.autograd.grad, torch.autograd.backward}
"""Functions of (what, with respect to what)."""
_HANDS_OUT = {torch.Tensor.data_ptr, torch.Tensor.storage_offset, torch.Tensor.__setitem__, torch.Tensor.data.__get__}  # type: ignore[attr-defined]  # torch's stub has the value in place of the descriptor


def writes(func: Any) -> bool:
    """Whether a torch function may write to its arguments, or hands out their memory: told by its name."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    may_be = "inplace" in getattr(getattr(func, "__code__", None), "co_varnames", ())
    return in_place or may_be or name.startswith("as_strided") or func in _HANDS_OUT or name == "__set__"


def is_apart(leaf: Any, memory: set[int]) -> bool:
    """Whether a part of a result has nothing to do with these storages."""
    if not isinstance(leaf, Tensor):
        return isinstance(leaf, _SCALARS)
    return type(leaf) is Tensor and (leaf.layout != torch.strided or leaf.untyped_storage()._cdata not in memory)

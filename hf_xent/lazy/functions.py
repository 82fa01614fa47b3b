"""What torch functions do with their arguments, as far as lazy tensors need to know: inspect, write, expose memory."""

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
_HOOKS: Any = torch.Tensor._backward_hooks  # the descriptor; torch's stub declares its value on a tensor

COMMUTATIVE = {torch.add, torch.mul, torch.multiply, *(getattr(torch.Tensor, name) for name in ("add", "mul"))}
"""Functions of two tensors in any order: the rule of a lazy tensor gets that tensor as its first argument."""
METADATA: set[Any] = {
    *torch.overrides.get_default_nowrap_functions(),
    *(getattr(torch.Tensor, name).__get__ for name in _PROPERTIES.split()),
    *(getattr(torch.Tensor, name) for name in _METHODS.split()),
    *(_HOOKS.__set__, torch.numel, torch.is_floating_point, torch.is_complex),
}
"""Functions that need the wrapper alone, not its values."""
OF_WRAPPER = {_HOOKS.__get__, _HOOKS.__set__}
"""Those of METADATA that always use the wrapper; the others use the dense values once these exist."""
DIFFERENTIATING = {torch.autograd.grad, torch.autograd.backward}
"""Functions whose arguments are (outputs, inputs to differentiate by)."""
_DATA: Any = torch.Tensor.data  # the descriptor; torch's stub declares its value on a tensor
_EXPOSING = {torch.Tensor.data_ptr, torch.Tensor.storage_offset, torch.Tensor.__setitem__, _DATA.__get__}
"""Functions that hand out the memory of a tensor."""


def writes(func: Any) -> bool:
    """Whether a torch function may write to its arguments, or exposes their memory, judged by its name."""
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    inplace_option = "inplace" in getattr(getattr(func, "__code__", None), "co_varnames", ())
    return in_place or inplace_option or name.startswith("as_strided") or func in _EXPOSING or name == "__set__"


def shares_no_memory(leaf: Any, memory: set[int]) -> bool:
    """Whether a leaf of a result shares no memory with these storages."""
    if not isinstance(leaf, Tensor):
        return isinstance(leaf, _SCALARS)
    return type(leaf) is Tensor and (leaf.layout != torch.strided or leaf.untyped_storage()._cdata not in memory)

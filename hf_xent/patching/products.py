"""Products with the vocabulary inside a layer that is not a plain linear one: each of them becomes lazy logits.

An adapter, a parametrization or another layer around the head computes its output by its own code. While it runs,
`F.linear` and `matmul` of the layer's rows with a matrix of the vocabulary's size return lazy logits; what the layer
does with these (sums, factors per token of the vocabulary) is recorded by `hf_xent.lazy`. So there is no table of
adapters: a branch `x A^T B^T` adds columns to the head, a weight that the layer itself makes, W + B A, is the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from ..lazy import LazyLogits
from ..lazy.arithmetic import within_layer
from ..ops import Head
from ..ops.higher import under_function_transform
from .calls import Call
from .forwards import OwnForward, lazy_product
from .gathered import unit_of, why_not_gathered
from .heads import branches_of, within_adapters

_MATMULS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_PLAIN = (Tensor, nn.Parameter)


class LazyProducts(OwnForward):
    """The forward of the layer that a model calls for its logits, where that is more than the head."""

    freed = False  # whether the head's weight is there during its call only
    obstacle = ""  # why nothing can be computed in such a call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own output, lazy if the current call needs that and the layer allows it."""
        rows = args[0] if args else None
        if torch.compiler.is_compiling():
            return self._traced(*args, **kwargs)
        call = Call.current(self.patch)
        wanted = self.patch.always if call is None else call.lazy_now
        if not wanted or type(rows) is not Tensor or under_function_transform(rows):
            return self.run(*args, **kwargs)
        if self.obstacle:
            if call is not None:
                call.reason = self.obstacle
            return self.run(*args, **kwargs)
        head = within_adapters(self.layer)
        fp32 = call is not None and call.float32
        with within_layer(), _Products(self.patch.state, rows, head.out_features, fp32):
            output = self.run(*args, **kwargs)
        if isinstance(output, LazyLogits) and not output.is_dense:
            if call is not None:
                call.lazy = True
        elif call is not None:
            kind, operation = type(self.layer), self.patch.state.operation or "its own product"
            name = f"{kind.__module__}.{kind.__qualname__}"
            call.reason = f"the adapter on the head ({name}) needs the logits' values, for {operation}"
            self.patch.state.reason = call.reason
        return output

    def gather_in(self, inner: nn.Module) -> None:
        """Notice whether weights of the layer are freed, and whether that leaves a way to compute with them."""
        head = within_adapters(self.layer)
        if is_parametrized(head):  # whose weight is computed in the layer's call, and stays
            return
        units = [(linear, unit_of(inner, linear)) for linear in (head, *branches_of(self.layer, head))]
        self.freed = any(unit is not None for _, unit in units)
        obstacles = (why_not_gathered(inner, linear, unit) for linear, unit in units)
        self.obstacle = next(filter(None, obstacles), "")

    def _traced(self, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output while torch traces it, lazy if the call needs that and the layer is a sum of products."""
        head = within_adapters(self.layer)
        if not self.patch.traced or self.obstacle or self.freed:
            return self.run(rows, *args, **kwargs)
        with _Products(self.patch.state, rows, head.out_features, fp32=False):
            return self.run(rows, *args, **kwargs)


class _Products(TorchFunctionMode):
    """Makes products of as many rows as a layer's input has, with a matrix of the vocabulary's size, lazy."""

    def __init__(self, state: Any, rows: Tensor, size: int, fp32: bool):
        super().__init__()
        self.state, self.rows, self.size, self.fp32 = state, rows.shape[:-1].numel(), size, fp32

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = None
        if func is F.linear:
            operands = _linear(*args, **kwargs)
        elif func in _MATMULS and len(args) == 2 and not kwargs and isinstance(args[1], Tensor) and args[1].ndim == 2:
            operands = args[0], args[1].T, None
        if operands is not None and self.fits(*operands):
            hidden, weight, bias = operands
            return lazy_product(hidden, Head(weight, bias, fp32=self.fp32), self.state)
        return func(*args, **kwargs)

    def fits(self, hidden: Any, weight: Any, bias: Any) -> bool:
        """Whether it is a product of the layer's rows with a plain matrix of the vocabulary's size, which stays."""
        plain = type(hidden) in _PLAIN and type(weight) in _PLAIN and (bias is None or type(bias) in _PLAIN)
        if not plain or weight.device != hidden.device or _is_gathered(weight):
            return False
        shapes = hidden.ndim > 1 and weight.ndim == 2 and hidden.shape[-1] == weight.shape[1] > 0
        alike = hidden.dtype == weight.dtype or torch.is_autocast_enabled(hidden.device.type)
        rows = hidden.shape[:-1].numel()
        return shapes and alike and weight.shape[0] == self.size and rows == self.rows and hidden.is_floating_point()


def _is_gathered(weight: Tensor) -> bool:
    """Whether ZeRO-3 frees a matrix, or the one that it is a view of, when the layer that reads it returns."""
    return any(hasattr(x, "ds_id") for x in (weight, weight._base) if x is not None)


def _linear(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:  # F.linear's own names
    return input, weight, bias

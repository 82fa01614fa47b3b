"""One Triton kernel that multiplies a tensor by a number on the device, and touches nothing where the number is 1.

The gradients that mode eager has ready are multiplied by the upstream gradient, which is 1 for a loss that is not part
of another: the host cannot know without waiting for the device, and the gradient of a head is large.
"""

# No `from __future__ import annotations`: Triton reads the annotations of kernel parameters as values.
import torch
import triton
import triton.language as tl
from torch import Tensor


def scale_unless_one_(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor in place, for a contiguous float tensor `x` and `factor` with one element on the same device."""
    if not x.is_contiguous():
        raise ValueError(f"x has strides {x.stride()}: pass a contiguous tensor")
    accumulator = tl.float64 if x.dtype == torch.float64 else tl.float32
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _scale_unless_one[(triton.cdiv(x.numel(), BLOCK),)](
            x, factor, x.numel(), ACC=accumulator, B=BLOCK, num_warps=WARPS
        )
    return x


@triton.jit
def _scale_unless_one(X, FACTOR, count, ACC: tl.constexpr, B: tl.constexpr):  # [count], one element
    factor = tl.load(FACTOR).to(ACC)
    if factor != 1.0:
        places = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
        x = tl.load(X + places, mask=places < count)
        tl.store(X + places, (x.to(ACC) * factor).to(X.dtype.element_ty), mask=places < count)


INTERPRETED = not isinstance(_scale_unless_one, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 at import
BLOCK, WARPS = (64, 1) if INTERPRETED else (16384, 8)  # elements of a program; not tuned

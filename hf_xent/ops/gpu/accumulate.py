"""total += x^T y with one addition per tile, which the copy engine of Hopper and later makes in memory: total is not read.

Source: prototype of this project; see benchmarks/results/h200 for where it is faster than `addmm_`.
"""

# No `from __future__ import annotations`: Triton reads the annotations of kernel parameters as values.
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernels import _bfloat16

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None


class Tiles(NamedTuple):
    """How the product is tiled and compiled: tiles [rows, columns] of the total, steps of `depth` tokens."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int  # per multiprocessor


@triton.jit(do_not_specialize=("n",))
def _add_matmul(
    X, Y, TOTAL,  # descriptors of [n, V], [n, D], [V, D]
    n, V, D, DOT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Every program walks tiles [BV, BD]; all of D comes first, so that the columns of x stay in the cache."""
    blocks = tl.cdiv(D, BD)
    for tile in tl.range(tl.program_id(0), tl.cdiv(V, BV) * blocks, PROGRAMS, flatten=FLATTEN):
        i = tile // blocks * BV
        j = tile % blocks * BD
        acc = tl.zeros((BV, BD), tl.float32)
        for t in range(0, n, BT):
            acc = tl.dot(X.load([t, i]).to(DOT).T, Y.load([t, j]).to(DOT), acc)
        if ATOMIC:
            TOTAL.atomic_add([i, j], acc.to(TOTAL.dtype))
        else:  # Triton's interpreter has no reduction through descriptors, and runs one program at a time
            TOTAL.store([i, j], _bfloat16(TOTAL.load([i, j]).to(tl.float32) + acc, True))


INTERPRETED = not isinstance(_add_matmul, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 at import
TILES = Tiles(16, 16, 16, 1, 1, 1) if INTERPRETED else Tiles(128, 128, 64, 8, 4, 1)


def supports(x: Tensor, y: Tensor, total: Tensor) -> bool:
    """Whether the copy engine reads and adds to these rows: bfloat16, contiguous and aligned to 16 bytes."""
    if TensorDescriptor is None or {x.dtype, y.dtype, total.dtype} != {torch.bfloat16}:
        return False
    if not INTERPRETED and (x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) < (9, 0)):
        return False
    return all(t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in (x, y, total))


def add_matmul(x: Tensor, y: Tensor, total: Tensor) -> None:
    """total [V, D] += x^T y for x [n, V] and y [n, D]."""
    n, size = x.shape
    tiles = triton.cdiv(size, TILES.rows) * triton.cdiv(y.shape[1], TILES.columns)
    most = 3 if INTERPRETED else torch.cuda.get_device_properties(x.device).multi_processor_count * TILES.programs
    programs = min(most, tiles)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _add_matmul[(programs,)](
            TensorDescriptor.from_tensor(x, [TILES.depth, TILES.rows]),
            TensorDescriptor.from_tensor(y, [TILES.depth, TILES.columns]),
            TensorDescriptor.from_tensor(total, [TILES.rows, TILES.columns]),
            n, size, y.shape[1],
            DOT=tl.float32 if INTERPRETED else tl.bfloat16, BV=TILES.rows, BD=TILES.columns, BT=TILES.depth,
            PROGRAMS=programs, FLATTEN=not INTERPRETED, ATOMIC=not INTERPRETED,
            num_warps=TILES.warps, num_stages=TILES.stages,
        )  # fmt: skip

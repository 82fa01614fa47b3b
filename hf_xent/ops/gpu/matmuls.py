"""Matmuls that work on their accumulators: the softmax and its gradient in the epilogue of the logits' matmul.

For a loss of log p_y alone, dz = a (p - r 1_y) = a / l (E - l r 1_y) with E = exp(z - c) and l = sum_j E_tj: the
normalizer joins the row factor, which scales [N, D] side matrices, and one entry per row is corrected. No pass over
[n, V] is left: the matmul writes E once, and the two matmuls of the gradients read it. Where the statistics are known
already, the matmul writes dz itself. Logits are never rounded to bfloat16.

    c = z_y + MARGIN    known before the matmul, from one dot product per row
    E                   representable while max z - z_y < 128 nats, since bfloat16 has the range of float32; rows where
                        a tile's maximum says otherwise are computed again about their maximum, in the kernel that
                        folds the tiles' sums
    softcap             E holds p times the slope of the softcap, which the chain rule multiplies by; the sums do not

Shapes: n tokens of a chunk, D hidden, V vocabulary, T tiles of columns.
Source: this project. Exponentials with an offset per row and tile are in quack's linear cross-entropy.
"""

# No `from __future__ import annotations`: Triton reads the annotations of kernel parameters as values.
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..algebra import Coefficients
from ..head import Head
from ..problem import Problem
from . import matmul_kernels as kernels

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

OUTPUTS = frozenset({"lse", "target", "entropy", "top"})  # the statistics that the epilogue sums up
MARGIN = 40.0  # nats from the label's logit to the offset: p_j / p_y may span e^-47 to e^128
FAR = 80.0  # nats from the offset beyond which a row is computed again


class Tiles(NamedTuple):
    """How a matmul is tiled and compiled: a tile is [rows, columns], its matmul takes steps of `depth`."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int  # columns of tiles that programs at work together share


INTERPRETED = not isinstance(kernels._exp_matmul, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 at import
# Within 1 % of the fastest of those tried at each of four shapes (benchmarks/results/h200).
TILES = Tiles(16, 32, 16, 1, 1, 2) if INTERPRETED else Tiles(128, 256, 64, 8, 3, 4)
DEPTH, BLOCK, COLUMNS = (16, 8, 64) if INTERPRETED else (32, 1024, 4096)
# Triton's interpreter takes bfloat16 for integers; products of bfloat16 are exact in float32
DOT = tl.float32 if INTERPRETED else tl.bfloat16


class Exponentials(NamedTuple):
    """What the visit of a chunk leaves beside E: the statistics, and [n] each for `add_label_term_`."""

    values: dict[str, Tensor]
    target: Tensor
    offset: Tensor
    total: Tensor


def supports(problem: Problem) -> bool:
    """Whether these matmuls compute all of a problem's statistics, and can read its operands."""
    head = problem.head
    plain = problem.payload is None and head.adapter is None and len(problem.labels) > 0
    # Triton 3.6 and 3.7 fail to compile a softcap in the epilogue for Blackwell (tests/test_offline.py)
    compiles = head.softcap is None or INTERPRETED or _capability(problem.hidden.device) < (10, 0)
    if head.by_panels or not (plain and compiles and problem.outputs <= OUTPUTS):
        return False
    return readable(problem.hidden, cast(Tensor, head.weight))


def readable(*matrices: Tensor) -> bool:
    """Whether the copy engine of Hopper and later GPUs reads these: bfloat16, rows aligned to 16 bytes."""
    if TensorDescriptor is None or any(x.dtype != torch.bfloat16 for x in matrices):
        return False
    return (INTERPRETED or _capability(matrices[0].device) >= (9, 0)) and all(
        x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 for x in matrices
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU; (0, 0) for other devices."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def rows_of(hidden: Tensor, size: int, count: int) -> Tensor:
    """Uninitialized rows [count, size] whose stride the copy engine can write."""
    stride = size if size % 8 == 0 else -(-size // 64) * 64
    rows = hidden.new_empty(count, stride)
    if INTERPRETED:  # CPUs with AMX multiply up to three numbers past the end of a row by 0: NaN, if they are NaN
        rows[:, size:] = 0
    return rows[:, :size]


def exponentials(hidden: Tensor, head: Head, labels: Tensor, outputs: frozenset[str], e: Tensor | None) -> Exponentials:
    """The statistics of rows of logits, whose E [n, V] is written to `e`, if any; labels [n] are in [0, V)."""
    n, features = hidden.shape
    tiles = triton.cdiv(head.size, TILES.columns)
    target, offset, total, lse, entropy = hidden.new_empty(5, n, dtype=torch.float32)
    sums, maxima = hidden.new_empty(2, n, tiles, dtype=torch.float32)
    moments = torch.empty_like(sums) if "entropy" in outputs else None
    top = labels.new_empty(n, tiles, dtype=torch.int32) if "top" in outputs else None
    best = None if top is None else labels.new_empty(n)
    bias, scale, cap = _activation(head)
    weight: Any = head.weight  # a tensor, says `supports`
    strides = hidden.stride(0), weight.stride(0)
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        kernels._label_logits[(n,)](
            hidden, head.weight, bias, labels.contiguous(), target, offset, features, *strides, scale,
            CAP=cap, MARGIN=MARGIN, BD=COLUMNS // 8, num_warps=1,
        )  # fmt: skip
        programs, options = _launch(hidden, TILES, triton.cdiv(n, TILES.rows) * tiles)
        kernels._exp_matmul[programs](
            *_operands(hidden, head), None if e is None else _half_tiles(e),
            bias, offset, sums, maxima, moments, top, n, head.size, features, scale, CAP=cap, ROUND=INTERPRETED,
            BT=TILES.rows, BV=TILES.columns, BD=TILES.depth, GROUP=TILES.group, **options,
        )  # fmt: skip
        kernels._fold_tiles[(n,)](
            hidden, head.weight, bias, e, offset, sums, maxima, moments, top, total, lse, entropy, best,
            tiles, head.size, features, *strides, 0 if e is None else e.stride(0), scale, CAP=cap, ROUND=INTERPRETED,
            FAR=FAR, BV=TILES.columns, BD=DEPTH, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    values = {"lse": lse, "target": target, "entropy": entropy, "top": best}
    return Exponentials({name: values[name] for name in outputs}, target, offset, total)


def add_label_term_(e: Tensor, head: Head, labels: Tensor, coef: Coefficients, sums: Exponentials) -> Tensor:
    """Turn E [n, V] into the gradient of the raw products up to a factor per row, and return that factor [n, 1].

    A label outside [0, V) has no entry here. Where a is 0 and o is not, the row becomes o 1_y, with the factor 1.
    """
    factor = torch.empty_like(sums.total)
    _, scale, cap = _activation(head)
    with torch.cuda.device_of(e):
        kernels._label_term[(len(e),)](
            e, labels.contiguous(), coef.a.contiguous(), coef.o.contiguous(), sums.target, sums.offset, sums.total,
            factor, head.size, e.stride(0), scale, CAP=cap, BV=COLUMNS, ROUND=INTERPRETED, num_warps=4,
        )  # fmt: skip
    return factor[:, None]


def dlogits(
    hidden: Tensor, head: Head, labels: Tensor, lse: Tensor, coef: Coefficients, dz: Tensor, share: Tensor | None
) -> None:
    """Write the gradient of the raw products to `dz` [n, V]; the softmax mass of the columns is added to `share` [n].

    `lse` may be that of a larger vocabulary of which these are some columns. A label outside [0, V) has no entry here.
    """
    n, features = hidden.shape
    tiles = triton.cdiv(head.size, TILES.columns)
    sums = None if share is None else hidden.new_empty(n, tiles, dtype=torch.float32)
    bias, scale, cap = _activation(head)
    numbers = (coef.a, coef.b, coef.c, coef.s, coef.o)
    with torch.cuda.device_of(hidden):
        programs, options = _launch(hidden, TILES, triton.cdiv(n, TILES.rows) * tiles)
        kernels._dlogits_matmul[programs](
            *_operands(hidden, head), _half_tiles(dz), bias, labels.contiguous(), lse.contiguous(),
            *(None if x is None else x.contiguous() for x in numbers), sums, n, head.size, features, scale, CAP=cap,
            BT=TILES.rows, BV=TILES.columns, BD=TILES.depth, GROUP=TILES.group, ROUND=INTERPRETED, **options,
        )  # fmt: skip
    if share is not None and sums is not None:
        share += sums.sum(1)


def _activation(head: Head) -> tuple[Tensor | None, float, float | None]:
    """The head's bias, scale and softcap as the kernels take them."""
    bias = None if head.bias is None else head.bias.contiguous()
    return bias, float(head.scale), None if head.softcap is None else float(head.softcap)


def _operands(hidden: Tensor, head: Head) -> tuple[Any, Any]:
    """The descriptors of the logits' matmul."""
    return (
        TensorDescriptor.from_tensor(hidden, [TILES.rows, TILES.depth]),
        TensorDescriptor.from_tensor(head.weight, [TILES.columns, TILES.depth]),
    )


def _half_tiles(out: Tensor) -> Any:
    """The descriptor of a result, which is stored one half of a tile after the other."""
    return TensorDescriptor.from_tensor(out, [TILES.rows, TILES.columns // 2])


def _launch(x: Tensor, tile: Tiles, tiles: int) -> tuple[tuple[int], dict[str, Any]]:
    """The grid of a persistent kernel, one program per multiprocessor, and the options of its compilation."""
    programs = min(3 if INTERPRETED else _multiprocessors(x.device), tiles)
    options = {"PROGRAMS": programs, "FLATTEN": not INTERPRETED, "DOT": DOT}
    return (programs,), options | {"num_warps": tile.warps, "num_stages": tile.stages}


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

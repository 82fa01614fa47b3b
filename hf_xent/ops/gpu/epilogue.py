"""The softmax in the epilogue of the logits' matmul: E = exp(z - c) in bfloat16, straight from float32 accumulators.

For a loss of log p_y alone, dz = a (p - r 1_y) = a / l (E - l r 1_y) with l = sum_j E_tj: the normalizer joins the row
factor, which scales [N, D] side matrices, and one entry per row is corrected. No pass over [n, V] is left: the matmul
writes E once, and the two matmuls of the gradients read it. Logits are never rounded to bfloat16.

    c = z_y + MARGIN    known before the matmul, from one dot product per row
    E                   representable while max z - z_y < 128 nats, since bfloat16 has the range of float32; rows where a
                        tile's maximum says otherwise are computed again about their maximum, in the kernel that folds
                        the tiles' sums
    softcap             E holds p times the slope of the softcap, which the chain rule multiplies by; the sums do not

Shapes: n tokens of a chunk, D hidden, V vocabulary, T tiles of columns.
Source: this project. Exponentials with an offset per row and tile are in quack's linear cross-entropy.
"""

# No `from __future__ import annotations`: Triton reads the annotations of kernel parameters as values.
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..algebra import Coefficients, State, finish
from ..head import Head
from .kernels import _activate, _bfloat16

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4
    TensorDescriptor = None

OUTPUTS = frozenset({"lse", "target", "entropy", "top"})  # the statistics that the epilogue sums up
MARGIN = 40.0  # nats from the label's logit to the offset: p_j / p_y may span e^-47 to e^128
FAR = 80.0  # nats from the offset beyond which a row is computed again


class Tiles(NamedTuple):
    """How the matmul is tiled and compiled: tiles [rows, columns], steps of `depth`, columns of tiles per group."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int


@triton.jit
def _label_logits(
    H, W, B, Y, TARGET, OFFSET,  # [n, D], [V, D], [V] or None, [n] each
    D, stride_h, stride_w, scale: tl.float64, CAP: tl.constexpr, MARGIN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The label's logit of one row per program, and the row's offset, which is finite for a banned label too."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(Y + row)
    acc = tl.zeros((1, BD), tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)[None, :]
        h = tl.load(H + row * stride_h + d, mask=d < D, other=0.0).to(tl.float32)
        acc += h * tl.load(W + label * stride_w + d, mask=d < D, other=0.0).to(tl.float32)
    raw = tl.sum(acc, 1, keep_dims=True)
    if B is not None:
        raw += tl.load(B + label).to(tl.float32)
    z = tl.sum(_activate(raw, scale, CAP, tl.float32))
    tl.store(TARGET + row, z)
    tl.store(OFFSET + row, tl.where(tl.abs(z) < float("inf"), z, 0.0) + MARGIN)


@triton.jit
def _exponentials(raw, B, offset, cols, V, scale, CAP: tl.constexpr):
    """u = z - c and e^u of a tile of products, and e^u times the softcap's slope."""
    if B is not None:
        raw += tl.load(B + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    z = _activate(raw, scale, CAP, tl.float32)
    u = tl.where(cols[None, :] < V, z - offset[:, None], float("-inf"))
    e = tl.exp(u)
    sloped = e
    if CAP is not None:
        sloped = e * (1 - (z / CAP) * (z / CAP))
    return u, e, sloped


@triton.jit(do_not_specialize=("n",))
def _exp_matmul(
    H, W, E,  # descriptors of [n, D], [V, D], [n, V]
    B, OFFSET, L, M, S1, TOP,  # [V] or None, [n], [n, T] each; S1 and TOP may be None
    n, V, D, scale: tl.float64, CAP: tl.constexpr,
    DOT: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Every program walks tiles [BT, BV]; row blocks come first within groups of columns, which stay in the cache."""
    row_blocks = tl.cdiv(n, BT)
    col_blocks = tl.cdiv(V, BV)
    width = GROUP * row_blocks
    for tile in tl.range(tl.program_id(0), row_blocks * col_blocks, PROGRAMS, flatten=FLATTEN):
        first = tile // width * GROUP
        size = tl.minimum(col_blocks - first, GROUP)
        i = (tile % width) // size
        j = first + (tile % width) % size
        acc = tl.zeros((BT, BV), tl.float32)
        for d in range(0, D, BD):
            acc = tl.dot(H.load([i * BT, d]).to(DOT), W.load([j * BV, d]).to(DOT).T, acc)
        rows = i * BT + tl.arange(0, BT)
        row_in = rows < n
        cols = j * BV + tl.arange(0, BV // 2)
        offset = tl.load(OFFSET + rows, mask=row_in, other=0.0)
        # one half of the columns after the other: both at once would not fit the registers
        left, right = tl.split(tl.permute(tl.reshape(acc, (BT, 2, BV // 2)), (0, 2, 1)))
        u, e, sloped = _exponentials(left, B, offset, cols, V, scale, CAP)
        E.store([i * BT, j * BV], _bfloat16(sloped, ROUND))
        total = tl.sum(e, 1)
        m = tl.max(u, 1)
        if S1 is not None:
            moment = tl.sum(e * tl.maximum(u, -1e4), 1)
        if TOP is not None:
            top = tl.min(tl.where(u == m[:, None], cols[None, :], V), 1)
        cols += BV // 2
        u, e, sloped = _exponentials(right, B, offset, cols, V, scale, CAP)
        E.store([i * BT, j * BV + BV // 2], _bfloat16(sloped, ROUND))
        total += tl.sum(e, 1)
        right_m = tl.max(u, 1)
        if S1 is not None:
            moment += tl.sum(e * tl.maximum(u, -1e4), 1)
        if TOP is not None:
            right_top = tl.min(tl.where(u == right_m[:, None], cols[None, :], V), 1)
            top = tl.where(right_m > m, right_top, top)
        cell = rows.to(tl.int64) * col_blocks + j
        tl.store(L + cell, total, mask=row_in)
        tl.store(M + cell, tl.maximum(m, right_m), mask=row_in)
        if S1 is not None:
            tl.store(S1 + cell, moment, mask=row_in)
        if TOP is not None:
            tl.store(TOP + cell, top, mask=row_in)


@triton.jit
def _fold_tiles(
    H, W, B, E, OFFSET, L, M, S1, TOP,  # [n, D], [V, D], [V] or None, [n, V], [n], [n, T] each
    TOTAL, MOMENT, BEST,  # [n] each: the sums over the tiles of L and S1, and the arg max
    T, V, D, stride_h, stride_w, stride_e, scale: tl.float64, CAP: tl.constexpr,
    FAR: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """The sums of a row's tiles; a row whose maximum is too far from its offset is computed again about the maximum."""
    row = tl.program_id(0).to(tl.int64)
    m = float("-inf")
    best = V
    for start in range(0, T, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        tile_m = tl.load(M + row * T + tiles, mask=tiles < T, other=float("-inf"))
        block_m = tl.max(tile_m, 0)
        if TOP is not None:
            top = tl.load(TOP + row * T + tiles, mask=tiles < T, other=V)
            first = tl.min(tl.where(tile_m == block_m, top, V), 0)
            best = tl.where(block_m > m, first, best)
        m = tl.maximum(m, block_m)
    if TOP is not None:
        tl.store(BEST + row, tl.where(best < V, best, 0))
    if m > FAR:
        offset = tl.load(OFFSET + row) + m
        tl.store(OFFSET + row, offset)
        for tile in range(0, T):
            cols = tile * BV + tl.arange(0, BV)
            acc = tl.zeros((BV,), tl.float32)
            for start in range(0, D, BD):
                d = start + tl.arange(0, BD)
                h = tl.load(H + row * stride_h + d, mask=d < D, other=0.0).to(tl.float32)
                where = cols.to(tl.int64)[:, None] * stride_w + d[None, :]
                w = tl.load(W + where, mask=(cols < V)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
                acc += tl.sum(w * h[None, :], 1)
            u, e, sloped = _exponentials(acc[None, :], B, tl.zeros((1,), tl.float32) + offset, cols, V, scale, CAP)
            tl.store(E + row * stride_e + cols[None, :], _bfloat16(sloped, ROUND), mask=(cols < V)[None, :])
            tl.store(L + row * T + tile, tl.sum(e))
            if S1 is not None:
                tl.store(S1 + row * T + tile, tl.sum(e * tl.maximum(u, -1e4)))
        tl.debug_barrier()  # what follows reads the sums that other threads have stored
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, T, BLOCK):
        tiles = start + tl.arange(0, BLOCK)
        total += tl.load(L + row * T + tiles, mask=tiles < T, other=0.0)
        if S1 is not None:
            moment += tl.load(S1 + row * T + tiles, mask=tiles < T, other=0.0)
    tl.store(TOTAL + row, tl.sum(total, 0))
    if S1 is not None:
        tl.store(MOMENT + row, tl.sum(moment, 0))


@triton.jit
def _label_term(
    E, Y, A, O, TARGET, OFFSET, TOTAL, FACTOR,  # [n, V], [n] each
    V, stride, scale: tl.float64, CAP: tl.constexpr, BV: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """E -> dz / factor for one row per program: o joins the label's entry. A row with a = 0 keeps nothing else."""
    row = tl.program_id(0).to(tl.int64)
    a = tl.load(A + row)
    o = tl.load(O + row)
    z = tl.load(TARGET + row)
    total = tl.load(TOTAL + row)
    no_softmax = a == 0
    divisor = tl.where(no_softmax, 1.0, a)
    factor = tl.where(no_softmax, tl.where(o == 0, 0.0, 1.0), a / total)
    tl.store(FACTOR + row, factor * tl.sum(tl.full((1,), scale, tl.float32)))
    e_row = E + row * stride
    if no_softmax & (o != 0):
        zero = tl.zeros((BV,), E.dtype.element_ty)
        for start in range(0, V, BV):
            cols = start + tl.arange(0, BV)
            tl.store(e_row + cols, zero, mask=cols < V)
        tl.debug_barrier()
    label = tl.load(Y + row)
    if (label >= 0) & (label < V):
        entry = tl.where(no_softmax, o, tl.exp(z - tl.load(OFFSET + row)) + o * total / divisor)
        if CAP is not None:
            entry *= 1 - (z / CAP) * (z / CAP)
        tl.store(e_row + label, _bfloat16(entry, ROUND))


INTERPRETED = not isinstance(_exp_matmul, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 at import
# benchmarks/results/h200: of the tiles tried there, these were the fastest at every height of a chunk.
TILES = Tiles(16, 32, 16, 1, 1, 2) if INTERPRETED else Tiles(128, 256, 64, 8, 3, 8)
DEPTH, BLOCK = (16, 8) if INTERPRETED else (32, 1024)


class Exponentials(NamedTuple):
    """What the visit of a chunk leaves beside E: the statistics, and [n] each for `add_label_term_`."""

    values: dict[str, Tensor]
    target: Tensor
    offset: Tensor
    total: Tensor


def supports(hidden: Tensor, head: Head) -> bool:
    """Whether the matmul can read these operands: bfloat16 in rows that the copy engine of Hopper and later reads."""
    if TensorDescriptor is None or hidden.dtype != torch.bfloat16 or head.adapter is not None:
        return False
    if not INTERPRETED and (hidden.device.type != "cuda" or torch.cuda.get_device_capability(hidden.device) < (9, 0)):
        return False
    return all(x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0 for x in (hidden, head.weight))


def rows_of(hidden: Tensor, size: int, count: int) -> Tensor:
    """Uninitialized rows [count, size] whose stride the copy engine can write."""
    return hidden.new_empty(count, -(-size // 64) * 64)[:, :size]


def exponentials(hidden: Tensor, head: Head, labels: Tensor, outputs: frozenset[str], e: Tensor) -> Exponentials:
    """Write E [n, V] to `e`, and return the statistics of its rows; labels [n] are in [0, V)."""
    n, features = hidden.shape
    tiles = triton.cdiv(head.size, TILES.columns)
    new = lambda *shape, dtype=torch.float32: hidden.new_empty(shape, dtype=dtype)  # noqa: E731
    target, offset, total = new(n), new(n), new(n)
    sums, maxima = new(n, tiles), new(n, tiles)
    moments = new(n, tiles) if "entropy" in outputs else None
    top = new(n, tiles, dtype=torch.int32) if "top" in outputs else None
    moment, best = (None if x is None else x.new_empty(n) for x in (moments, top))
    bias = None if head.bias is None else head.bias.contiguous()
    cap, scale, labels = None if head.softcap is None else float(head.softcap), float(head.scale), labels.contiguous()
    strides = hidden.stride(0), head.weight.stride(0)
    programs = triton.cdiv(n, TILES.rows) * tiles
    programs = min(programs, 3 if INTERPRETED else _multiprocessors(hidden.device))
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        _label_logits[(n,)](
            hidden, head.weight, bias, labels, target, offset, features, *strides, scale,
            CAP=cap, MARGIN=MARGIN, BD=16 if INTERPRETED else 512, num_warps=1,
        )  # fmt: skip
        _exp_matmul[(programs,)](
            TensorDescriptor.from_tensor(hidden, [TILES.rows, TILES.depth]),
            TensorDescriptor.from_tensor(head.weight, [TILES.columns, TILES.depth]),
            TensorDescriptor.from_tensor(e, [TILES.rows, TILES.columns // 2]),
            bias, offset, sums, maxima, moments, top, n, head.size, features, scale, CAP=cap,
            # Triton's interpreter takes bfloat16 for integers; products of bfloat16 are exact in float32
            DOT=tl.float32 if INTERPRETED else tl.bfloat16,
            BT=TILES.rows, BV=TILES.columns, BD=TILES.depth, GROUP=TILES.group, PROGRAMS=programs,
            FLATTEN=not INTERPRETED, ROUND=INTERPRETED, num_warps=TILES.warps, num_stages=TILES.stages,
        )  # fmt: skip
        _fold_tiles[(n,)](
            hidden, head.weight, bias, e, offset, sums, maxima, moments, top, total, moment, best,
            tiles, head.size, features, *strides, e.stride(0), scale, CAP=cap,
            FAR=FAR, BV=TILES.columns, BD=DEPTH, BLOCK=BLOCK, ROUND=INTERPRETED, num_warps=4,
        )  # fmt: skip
    state = State(m=offset, l=total, s1=moment, top=None if best is None else best.long())
    values = finish(state, target, head.size)
    return Exponentials({name: values[name] for name in outputs}, target, offset, total)


def add_label_term_(e: Tensor, head: Head, labels: Tensor, coef: Coefficients, sums: Exponentials) -> Tensor:
    """Turn E [n, V] into the gradient of the raw products up to a factor per row, and return that factor [n, 1].

    A label outside [0, V) has no entry here. Where a is 0 and o is not, the row becomes o 1_y, with the factor 1.
    """
    factor = torch.empty_like(sums.total)
    with torch.cuda.device_of(e):
        _label_term[(len(e),)](
            e, labels.contiguous(), coef.a.contiguous(), coef.o.contiguous(), sums.target, sums.offset, sums.total,
            factor, head.size, e.stride(0), float(head.scale),
            CAP=None if head.softcap is None else float(head.softcap), BV=64 if INTERPRETED else 4096, ROUND=INTERPRETED,
            num_warps=4,
        )  # fmt: skip
    return factor[:, None]


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

"""Triton kernels over stored logits: what `tiles` does strip by strip in torch, in one pass per tile on a GPU.

    softmax_      raw products -> softmax, in place, and the statistics of the rows      2 reads, 1 write
    column_sums   softmax -> sums over tokens, for the sparse tail                       1 read

Shapes: z [n, V] of any stride between rows. Numerics: as in `statistics`; z keeps its dtype.
"""

# No `from __future__ import annotations`: Triton reads the annotations of kernel parameters as values.
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..head import Head
from ..statistics import wide

OUTPUTS = frozenset({"lse", "target", "entropy", "top"})  # what a pass over stored rows computes


def softmax_(
    z: Tensor,
    labels: Tensor,
    head: Head,
    *,
    overwrite: bool = True,
    lse: Tensor | None = None,
    share: Tensor | None = None,
) -> dict[str, Tensor]:
    """The OUTPUTS of rows of raw products; with `overwrite` their softmax takes their place.

    `lse` [n], if any, is that of a larger vocabulary of which these are some columns. It is used in place of the rows'
    own; no statistics are returned, and the sums of the rows are added to `share` [n], if any.
    """
    dtype = wide(z.dtype)
    known = lse is not None
    values = {name: z.new_empty(0 if known else len(z), dtype=dtype) for name in ("target", "entropy")}
    values["top"] = labels.new_empty(0 if known else len(z))
    lse = z.new_empty(len(z), dtype=dtype) if lse is None else lse.contiguous()
    if len(z):
        with torch.cuda.device_of(z):  # Triton launches on the current device
            _softmax_rows[(len(z),)](
                z, labels.contiguous(), lse, values["target"], values["entropy"], values["top"], share,
                z.shape[1], z.stride(0), float(head.scale),
                OVERWRITE=overwrite, KNOWN=known, ACC=_accumulator(dtype), BV=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return {} if known else {"lse": lse, **values}


def column_sums(p: Tensor, a: Tensor, energy: Tensor, mass: Tensor) -> None:
    """energy [V] += sum_t (a_t p_tj)^2 and mass [V] += sum_t a_t p_tj, for rows p [n, V] and weights a [n]."""
    with torch.cuda.device_of(p):
        _column_sums[(triton.cdiv(p.shape[1], COLUMNS),)](
            p, a.contiguous(), energy, mass, len(p), p.shape[1], p.stride(0),
            ACC=_accumulator(energy.dtype), BT=ROWS, BV=COLUMNS, num_warps=SUM_WARPS,
        )  # fmt: skip


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def _softmax_rows(
    Z,  # [n, V]
    Y, LSE, TARGET, ENTROPY, TOP, SHARE,  # [n] each; SHARE or None
    V, stride, scale: tl.float64,
    OVERWRITE: tl.constexpr, KNOWN: tl.constexpr, ACC: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One row per program. The fold is that of `kernels._stats_fwd`, for stored logits."""
    row = tl.program_id(0).to(tl.int64)
    z_row = Z + row * stride
    factor = tl.full((1,), scale, ACC)
    if KNOWN:
        lse = tl.load(LSE + row)
    else:
        m = tl.full((1,), float("-inf"), ACC)
        l = tl.zeros((1,), ACC)
        s1 = tl.zeros((1,), ACC)
        top = tl.zeros((1,), tl.int64)
        # read before the reductions below, where all warps synchronize: later, another warp may have written p there
        tl.store(TARGET + row, tl.load(z_row + tl.load(Y + row)).to(ACC) * tl.sum(factor, 0))
        for start in range(0, V, BV):
            cols = start + tl.arange(0, BV)
            z = tl.load(z_row + cols, mask=cols < V, other=0.0).to(ACC) * factor
            z = tl.where(cols < V, z, float("-inf"))
            tile_m = tl.max(z, 0, keep_dims=True)
            first = tl.min(tl.where(z == tile_m, cols, V), 0, keep_dims=True)
            top = tl.where((tile_m > m) & (first < V), first, top)
            new_m = tl.maximum(m, tile_m)
            origin = tl.where(new_m == float("-inf"), 0.0, new_m)
            u = z - origin
            e = tl.exp(u)
            delta = tl.maximum(m - origin, -1e4)
            s1 = tl.exp(delta) * (s1 + delta * l) + tl.sum(e * tl.maximum(u, -1e4), 0, keep_dims=True)
            l = tl.exp(delta) * l + tl.sum(e, 0, keep_dims=True)
            m = new_m
        lse = tl.sum(m + tl.log(l), 0)
        tl.store(LSE + row, lse)
        tl.store(ENTROPY + row, tl.sum(tl.log(l) - s1 / l, 0))
        tl.store(TOP + row, tl.sum(top, 0))
    if OVERWRITE:
        total = tl.zeros((1,), ACC)
        for start in range(0, V, BV):
            cols = start + tl.arange(0, BV)
            z = tl.load(z_row + cols, mask=cols < V, other=0.0).to(ACC) * factor
            p = tl.where(cols < V, tl.exp(z - lse), 0.0)
            total += tl.sum(p, 0, keep_dims=True)
            tl.store(z_row + cols, p.to(Z.dtype.element_ty), mask=cols < V)
        if SHARE is not None:
            tl.store(SHARE + row, tl.load(SHARE + row) + tl.sum(total, 0))


@triton.jit(do_not_specialize=("n",))
def _column_sums(
    P,  # [n, V]
    A,  # [n]
    ENERGY, MASS,  # [V] each
    n, V, stride, ACC: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BV columns per program, all rows: no other program writes there."""
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    col_in = cols < V
    energy = tl.zeros((BV,), ACC)
    mass = tl.zeros((BV,), ACC)
    for start in range(0, n, BT):
        rows = start + tl.arange(0, BT)
        row_in = rows < n
        a = tl.load(A + rows, mask=row_in, other=0.0)[:, None]
        offsets = rows.to(tl.int64)[:, None] * stride + cols[None, :]
        x = a * tl.load(P + offsets, mask=row_in[:, None] & col_in[None, :], other=0.0).to(ACC)
        energy += tl.sum(x * x, 0)
        mass += tl.sum(x, 0)
    tl.store(ENERGY + cols, tl.load(ENERGY + cols, mask=col_in, other=0.0) + energy, mask=col_in)
    tl.store(MASS + cols, tl.load(MASS + cols, mask=col_in, other=0.0) + mass, mask=col_in)


INTERPRETED = not isinstance(_softmax_rows, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 at import
# Columns a row's program holds at a time; rows and columns of a tile of the sums. Not tuned: no GPU has run them yet.
BLOCK, ROWS, COLUMNS = (64, 4, 32) if INTERPRETED else (8192, 16, 512)
WARPS, SUM_WARPS = (1, 1) if INTERPRETED else (16, 8)

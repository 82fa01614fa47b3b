"""Raw Triton kernels of matmuls that work on their accumulators; `matmuls` allocates, checks and launches them.

    _exp_matmul        E = exp(z - c) of the logits z, and sums over tiles of columns
    _dlogits_matmul    the gradient of the products, where the statistics are known

Shapes: n tokens of a chunk, D hidden, V vocabulary, T tiles of columns. A tile is [BT, BV], its matmul takes steps BD.
Numerics: accumulators and all that is computed from them are float32; E and the gradient are bfloat16.
The tensors of a matmul are descriptors, for the copy engine of Hopper and later GPUs.
"""

# No `from __future__ import annotations`: Triton reads the annotations of kernel parameters as values.
import triton
import triton.language as tl

from .kernels import _activate, _chain


@triton.jit
def _bfloat16(x, ROUND: tl.constexpr):
    """x in bfloat16. Triton's interpreter truncates, so that it needs the rounding to the nearest even beforehand."""
    if ROUND:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


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
def _place(tile, row_blocks, col_blocks, GROUP: tl.constexpr):
    """The row block and the column block of a tile: row blocks come first within groups of columns, for the cache."""
    width = GROUP * row_blocks
    first = tile // width * GROUP
    size = tl.minimum(col_blocks - first, GROUP)
    return (tile % width) // size, first + (tile % width) % size


@triton.jit
def _products(H, W, i, j, D, DOT: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):
    """One tile [BT, BV] of raw products, without the bias."""
    acc = tl.zeros((BT, BV), tl.float32)
    for d in range(0, D, BD):
        acc = tl.dot(H.load([i * BT, d]).to(DOT), W.load([j * BV, d]).to(DOT).T, acc)
    return acc


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
    H, W, E,  # descriptors of [n, D], [V, D], [n, V]; E may be None
    B, OFFSET, L, M, S1, TOP,  # [V] or None, [n], [n, T] each; S1 and TOP may be None
    n, V, D, scale: tl.float64, CAP: tl.constexpr,
    DOT: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Every program walks tiles [BT, BV], in the order of `_place`."""
    row_blocks = tl.cdiv(n, BT)
    col_blocks = tl.cdiv(V, BV)
    for tile in tl.range(tl.program_id(0), row_blocks * col_blocks, PROGRAMS, flatten=FLATTEN):
        i, j = _place(tile, row_blocks, col_blocks, GROUP)
        acc = _products(H, W, i, j, D, DOT, BT, BV, BD)
        rows = i * BT + tl.arange(0, BT)
        row_in = rows < n
        cols = j * BV + tl.arange(0, BV // 2)
        offset = tl.load(OFFSET + rows, mask=row_in, other=0.0)
        # one half of the columns after the other: both at once would not fit the registers
        left, right = tl.split(tl.permute(tl.reshape(acc, (BT, 2, BV // 2)), (0, 2, 1)))
        u, e, sloped = _exponentials(left, B, offset, cols, V, scale, CAP)
        if E is not None:
            E.store([i * BT, j * BV], _bfloat16(sloped, ROUND))
        total = tl.sum(e, 1)
        m = tl.max(u, 1)
        if S1 is not None:
            moment = tl.sum(e * tl.maximum(u, -1e4), 1)
        if TOP is not None:
            top = tl.min(tl.where(u == m[:, None], cols[None, :], V), 1)
        cols += BV // 2
        u, e, sloped = _exponentials(right, B, offset, cols, V, scale, CAP)
        if E is not None:
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
    H, W, B, E, OFFSET, L, M, S1, TOP,  # [n, D], [V, D], [V] or None, [n, V] or None, [n], [n, T] each
    TOTAL, LSE, ENTROPY, BEST,  # [n] each: the sum over the tiles of L, and the statistics
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
            if E is not None:
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
    total = tl.sum(total, 0)
    log_l = tl.log(total)  # the statistics as `algebra.finish` computes them
    tl.store(TOTAL + row, total)
    tl.store(LSE + row, tl.load(OFFSET + row) + log_l)
    if S1 is not None:
        tl.store(ENTROPY + row, log_l - tl.sum(moment, 0) / total)


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


@triton.jit
def _dlogits(raw, B, lse, labels, cols, V, GA, GB, GC, GS, GO, rows, row_in, scale, CAP: tl.constexpr):
    """The gradient of a tile of products by the formula in `algebra`, and the softmax p."""
    if B is not None:
        raw += tl.load(B + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    z = _activate(raw, scale, CAP, tl.float32)
    logp = z - lse[:, None]
    p = tl.where(cols[None, :] < V, tl.exp(logp), 0.0)
    g = tl.load(GA + rows, mask=row_in, other=0.0)[:, None]
    if GB is not None or GC is not None:
        logp = tl.maximum(logp, -1e4)  # 0 * -inf of a banned token
    if GB is not None:
        g += tl.load(GB + rows, mask=row_in, other=0.0)[:, None] * logp
    if GC is not None:
        g += tl.load(GC + rows, mask=row_in, other=0.0)[:, None] * logp * logp
    dz = p * g
    if GS is not None:
        dz += tl.load(GS + rows, mask=row_in, other=0.0)[:, None]
    dz += tl.where(cols[None, :] == labels[:, None], tl.load(GO + rows, mask=row_in, other=0.0)[:, None], 0.0)
    return _chain(dz, z, scale, CAP, tl.float32), p


@triton.jit(do_not_specialize=("n",))
def _dlogits_matmul(
    H, W, DZ,  # descriptors of [n, D], [V, D], [n, V]
    B, Y, LSE, GA, GB, GC, GS, GO, L,  # [V] or None, [n] each; GB, GC and GS may be None; [n, T] or None
    n, V, D, scale: tl.float64, CAP: tl.constexpr,
    DOT: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """As `_exp_matmul`, where the statistics are known: the gradient of the products, and sums of p over tiles."""
    row_blocks = tl.cdiv(n, BT)
    col_blocks = tl.cdiv(V, BV)
    for tile in tl.range(tl.program_id(0), row_blocks * col_blocks, PROGRAMS, flatten=FLATTEN):
        i, j = _place(tile, row_blocks, col_blocks, GROUP)
        acc = _products(H, W, i, j, D, DOT, BT, BV, BD)
        rows = i * BT + tl.arange(0, BT)
        row_in = rows < n
        lse = tl.load(LSE + rows, mask=row_in, other=0.0)
        labels = tl.load(Y + rows, mask=row_in, other=-1)
        left, right = tl.split(tl.permute(tl.reshape(acc, (BT, 2, BV // 2)), (0, 2, 1)))
        cols = j * BV + tl.arange(0, BV // 2)
        dz, p = _dlogits(left, B, lse, labels, cols, V, GA, GB, GC, GS, GO, rows, row_in, scale, CAP)
        DZ.store([i * BT, j * BV], _bfloat16(dz, ROUND))
        total = tl.sum(p, 1)
        cols += BV // 2
        dz, p = _dlogits(right, B, lse, labels, cols, V, GA, GB, GC, GS, GO, rows, row_in, scale, CAP)
        DZ.store([i * BT, j * BV + BV // 2], _bfloat16(dz, ROUND))
        if L is not None:
            tl.store(L + rows.to(tl.int64) * col_blocks + j, total + tl.sum(p, 1), mask=row_in)

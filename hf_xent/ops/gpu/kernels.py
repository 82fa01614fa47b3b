"""Raw Triton kernels of the streaming backend; `streaming` allocates, checks and launches them.

    raw[t,j] = h_t . W_j + b_j        z = cap tanh(scale raw / cap), or scale raw without a cap
    forward:   (m, l, s1, s2, sp, sq, sz, top, rank) of z's rows, folded tile by tile (`algebra.merge` in registers)
    backward:  dz = p (a + b logp + c logp^2 + d pay) + s + o 1[j = y]        dH = dz W    dW = dz^T H    db = sum_t dz

Shapes: N tokens, V vocabulary, D hidden (D2 of the second head), walked in blocks BT, BV, BD. A pointer is the capital
of its host name; a 2 marks the second head, a leading D a gradient, a leading G a coefficient. A pointer that is None
is a compile-time constant, so that what was not requested costs nothing.
Numerics: ACC (float32; float64 for float64 inputs) holds logits, states and sums. dz is rounded to the inputs' dtype
for its matmuls, as dense autograd rounds it. DOT is the dtype of tl.dot's operands.
Indexing: a row or column is widened to 64 bits before it is multiplied by a stride: V D exceeds 2^31 in large heads.
INDEX is the dtype that a place in D is multiplied by its stride in: 64 bits unless that stride is 1.
"""

# No `from __future__ import annotations`: Triton reads the annotations of kernel parameters as values.
import triton
import triton.language as tl


@triton.jit
def _product(
    H, rows, row_in, stride_h,  # [N, D], [BT], [BT]
    W, B, cols, col_in, stride_wv, stride_wd,  # [V, D], [V] or None, [BV], [BV]
    D,
    ACC: tl.constexpr, DOT: tl.constexpr, INDEX: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One tile [BT, BV] of raw logits; zero outside the masks, except for the bias."""
    h_row = H + rows.to(tl.int64)[:, None] * stride_h
    w_col = W + cols.to(tl.int64)[None, :] * stride_wv
    acc = tl.zeros((BT, BV), dtype=ACC)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        h = tl.load(h_row + d[None, :], mask=row_in[:, None] & (d < D)[None, :], other=0.0)
        w = tl.load(w_col + d.to(INDEX)[:, None] * stride_wd, mask=col_in[None, :] & (d < D)[:, None], other=0.0)
        acc = tl.dot(h.to(DOT), w.to(DOT), acc, input_precision="ieee", out_dtype=ACC)
    if B is not None:
        acc += tl.load(B + cols, mask=col_in, other=0.0).to(ACC)[None, :]
    return acc


@triton.jit
def _activate(raw, scale, CAP: tl.constexpr, ACC: tl.constexpr):
    """Scale and softcap, for a tile of any shape; tanh is computed from e^(-2|x|) <= 1, which cannot overflow."""
    # the scale is passed as float64 and rounded once here: a float64 factor would make the whole tile float64
    if CAP is None:
        z = raw * tl.full((), scale, ACC)
    else:
        x = raw * tl.full((), scale / CAP, ACC)
        t = tl.exp(-2 * tl.abs(x))
        y = (1 - t) / (1 + t)
        z = CAP * tl.where(x < 0, -y, y)
    return z


@triton.jit
def _chain(dz, z, scale, CAP: tl.constexpr, ACC: tl.constexpr):
    """Gradient of the raw product from the gradient of the activated logit z."""
    dz = dz * tl.full((), scale, ACC)
    if CAP is not None:
        dz *= 1 - (z / CAP) * (z / CAP)
    return dz


@triton.jit(do_not_specialize=("N",))
def _target_fwd(
    H, W, B, Y, TARGET,  # [N, D], [V, D], [V] or None, [N], [N]
    N, D, stride_h, stride_wv, stride_wd,
    scale: tl.float64, CAP: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, INDEX: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The label's logit [N]: the diagonal of the tile (BT tokens) x (their BT labels).

    A tl.dot like the tiles of `_stats_fwd`, not a sum of products: `rank` compares the two, and a copy of the
    label's row elsewhere in the head should come out equal, not larger by a rounding.
    """
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    row_in = rows < N
    labels = tl.load(Y + rows, mask=row_in, other=0)
    raw = _product(
        H, rows, row_in, stride_h, W, B, labels, row_in, stride_wv, stride_wd, D, ACC, DOT, INDEX, BT, BT, BD
    )
    z = _activate(raw, scale, CAP, ACC)
    diagonal = tl.arange(0, BT)[:, None] == tl.arange(0, BT)[None, :]
    tl.store(TARGET + rows, tl.sum(tl.where(diagonal, z, 0.0), 1), mask=row_in)


@triton.jit(do_not_specialize=("N",))
def _stats_fwd(
    H, W, B, Y, TARGET, H2, W2, B2,  # [N, D], [V, D], [V], [N], [N], [N, D2], [V, D2], [V]; B, H2, W2, B2 or None
    M, L, S1, S2, SP, SQ, SZ, TOP, RANK,  # [splits, N] each, or None
    N, V, D, stride_h, stride_wv, stride_wd,
    D2, stride_h2, stride_wv2, stride_wd2,
    scale: tl.float64, scale2: tl.float64, CAP: tl.constexpr, CAP2: tl.constexpr,
    share,  # columns a split walks, a multiple of BV
    ACC: tl.constexpr, DOT: tl.constexpr, DOT2: tl.constexpr, INDEX: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The state of BT rows over one split of the vocabulary. Grid: (row blocks, splits).

    Row blocks come first, so that programs at work together read the same columns of W, from the cache.
    """
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    row_in = rows < N
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, V)
    labels = tl.load(Y + rows, mask=row_in, other=0)
    target = tl.load(TARGET + rows, mask=row_in, other=0.0)
    m = tl.full((BT,), float("-inf"), ACC)
    l = tl.zeros((BT,), ACC)
    s1 = tl.zeros((BT,), ACC)
    s2 = tl.zeros((BT,), ACC)
    sp = tl.zeros((BT,), ACC)
    sq = tl.zeros((BT,), ACC)
    sz = tl.zeros((BT,), ACC)
    top = tl.zeros((BT,), tl.int32)
    rank = tl.zeros((BT,), tl.int32)
    for start in range(begin, end, BV):
        cols = start + tl.arange(0, BV)
        col_in = cols < V
        raw = _product(
            H, rows, row_in, stride_h, W, B, cols, col_in, stride_wv, stride_wd, D, ACC, DOT, INDEX, BT, BV, BD
        )
        z = tl.where(col_in[None, :], _activate(raw, scale, CAP, ACC), float("-inf"))
        tile_m = tl.max(z, 1)
        new_m = tl.maximum(m, tile_m)
        if SZ is not None:
            sz += tl.sum(tl.where(col_in[None, :], z, 0.0), 1)
        if TOP is not None:
            first = tl.min(tl.where(z == tile_m[:, None], cols[None, :], V), 1)
            top = tl.where((tile_m > m) & (first < V), first, top)
        if RANK is not None:
            above = (z > target[:, None]) & (cols[None, :] != labels[:, None])
            rank += tl.sum(above.to(tl.int32), 1)
        # a row with nothing but -inf so far: -inf - 0, not -inf + inf
        origin = tl.where(new_m == float("-inf"), 0.0, new_m)
        u = z - origin[:, None]
        e = tl.exp(u)
        # a banned token (z = -inf) adds 0 * -1e4 to the moments, not 0 * -inf; likewise an empty state when it moves
        u = tl.maximum(u, -1e4)
        delta = tl.maximum(m - origin, -1e4)
        factor = tl.exp(delta)
        if S2 is not None:
            s2 = factor * (s2 + 2 * delta * s1 + delta * delta * l) + tl.sum(e * u * u, 1)
        if S1 is not None:
            s1 = factor * (s1 + delta * l) + tl.sum(e * u, 1)
        if SQ is not None:
            sq = factor * factor * sq + tl.sum(e * e, 1)
        if SP is not None:
            raw2 = _product(
                H2, rows, row_in, stride_h2, W2, B2, cols, col_in, stride_wv2, stride_wd2, D2, ACC, DOT2, INDEX, BT,
                BV, BD,
            )  # fmt: skip
            sp = factor * sp + tl.sum(e * _activate(raw2, scale2, CAP2, ACC), 1)
        l = factor * l + tl.sum(e, 1)
        m = new_m
    offsets = tl.program_id(1).to(tl.int64) * N + rows
    tl.store(M + offsets, m, mask=row_in)
    tl.store(L + offsets, l, mask=row_in)
    if S1 is not None:
        tl.store(S1 + offsets, s1, mask=row_in)
    if S2 is not None:
        tl.store(S2 + offsets, s2, mask=row_in)
    if SP is not None:
        tl.store(SP + offsets, sp, mask=row_in)
    if SQ is not None:
        tl.store(SQ + offsets, sq, mask=row_in)
    if SZ is not None:
        tl.store(SZ + offsets, sz, mask=row_in)
    if TOP is not None:
        tl.store(TOP + offsets, top, mask=row_in)
    if RANK is not None:
        tl.store(RANK + offsets, rank, mask=row_in)


@triton.jit
def _push(
    dz, H, W, DH, DW,  # [BT, BV], [N, D], [V, D], [N, D] or None, [V, D] or None
    rows, row_in, cols, col_in, D, stride_h, stride_wv, stride_wd,
    ACC: tl.constexpr, DOT: tl.constexpr, INDEX: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add one tile's dH = dz W and dW = dz^T H to the sums [N, D] and [V, D]; nothing to do for a tile of zeros."""
    if tl.sum((dz != 0).to(tl.int32)) > 0:
        row = rows.to(tl.int64)[:, None]
        col = cols.to(tl.int64)[:, None]
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)[None, :]
            row_mask = row_in[:, None] & (d < D)
            col_mask = col_in[:, None] & (d < D)
            if DH is not None:
                w = tl.load(W + col * stride_wv + d.to(INDEX) * stride_wd, mask=col_mask, other=0.0).to(DOT)
                dh = tl.dot(dz.to(DOT), w, input_precision="ieee", out_dtype=ACC)
                tl.atomic_add(DH + row * D + d, dh.to(DH.dtype.element_ty), mask=row_mask, sem="relaxed")
            if DW is not None:
                h = tl.load(H + row * stride_h + d, mask=row_mask, other=0.0).to(DOT)
                dw = tl.dot(tl.trans(dz).to(DOT), h, input_precision="ieee", out_dtype=ACC)
                tl.atomic_add(DW + col * D + d, dw.to(DW.dtype.element_ty), mask=col_mask, sem="relaxed")


@triton.jit(do_not_specialize=("N",))
def _stats_bwd(
    H, W, B, Y, LSE, H2, W2, B2,  # [N, D], [V, D], [V], [N], [N], [N, D2], [V, D2], [V]; B, H2, W2, B2 or None
    GA, GB, GC, GD, GS, GO,  # coefficients [N], or None for zero
    SHARE,  # [N] gains sum_j p_tj, or None
    DH, DW, DB, DH2, DW2, DB2,  # sums in the shapes of H, W, B, H2, W2, B2, or None where frozen
    N, V, D, stride_h, stride_wv, stride_wd,
    D2, stride_h2, stride_wv2, stride_wd2,
    scale: tl.float64, scale2: tl.float64, CAP: tl.constexpr, CAP2: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, DOT2: tl.constexpr, INDEX: tl.constexpr,
    BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile, recomputed. Grid: (row blocks, column blocks)."""
    rows = tl.program_id(0) * BT + tl.arange(0, BT)
    cols = tl.program_id(1) * BV + tl.arange(0, BV)
    row_in = rows < N
    col_in = cols < V
    raw = _product(H, rows, row_in, stride_h, W, B, cols, col_in, stride_wv, stride_wd, D, ACC, DOT, INDEX, BT, BV, BD)
    z = _activate(raw, scale, CAP, ACC)
    lse = tl.load(LSE + rows, mask=row_in, other=0.0)[:, None]
    # outside the masks z - lse is not a logp: its exponential could be infinite, and inf times a loaded zero is NaN
    logp = tl.where(row_in[:, None] & col_in[None, :], z - lse, float("-inf"))
    p = tl.exp(logp)
    if SHARE is not None:
        tl.atomic_add(SHARE + rows, tl.sum(p, 1), mask=row_in, sem="relaxed")
    logp = tl.maximum(logp, -1e4)  # 0 * -inf of a banned token
    g = tl.load(GA + rows, mask=row_in, other=0.0)[:, None]
    if GB is not None:
        g += tl.load(GB + rows, mask=row_in, other=0.0)[:, None] * logp
    if GC is not None:
        g += tl.load(GC + rows, mask=row_in, other=0.0)[:, None] * logp * logp
    if GD is not None:
        d = tl.load(GD + rows, mask=row_in, other=0.0)[:, None]
        raw2 = _product(
            H2, rows, row_in, stride_h2, W2, B2, cols, col_in, stride_wv2, stride_wd2, D2, ACC, DOT2, INDEX, BT, BV, BD
        )
        pay = _activate(raw2, scale2, CAP2, ACC)
        g += d * pay
        dpay = _chain(d * p, pay, scale2, CAP2, ACC)
    dz = p * g
    if GS is not None:
        dz += tl.load(GS + rows, mask=row_in, other=0.0)[:, None]
    if GO is not None:
        labels = tl.load(Y + rows, mask=row_in, other=-1)
        dz += tl.where(cols[None, :] == labels[:, None], tl.load(GO + rows, mask=row_in, other=0.0)[:, None], 0.0)
    dz = _chain(dz, z, scale, CAP, ACC)
    if DB is not None:
        tl.atomic_add(DB + cols, tl.sum(dz, 0).to(DB.dtype.element_ty), mask=col_in, sem="relaxed")
    # both tiles are rounded before the first matmul: two wide ones would not fit the registers
    low = dz.to(H.dtype.element_ty)
    if GD is not None:
        if DB2 is not None:
            tl.atomic_add(DB2 + cols, tl.sum(dpay, 0).to(DB2.dtype.element_ty), mask=col_in, sem="relaxed")
        low2 = dpay.to(H2.dtype.element_ty)
        if DH2 is not None or DW2 is not None:
            _push(
                low2, H2, W2, DH2, DW2, rows, row_in, cols, col_in, D2, stride_h2, stride_wv2, stride_wd2, ACC, DOT2,
                INDEX, BD,
            )  # fmt: skip
    if DH is not None or DW is not None:
        _push(low, H, W, DH, DW, rows, row_in, cols, col_in, D, stride_h, stride_wv, stride_wd, ACC, DOT, INDEX, BD)


@triton.jit(do_not_specialize=("N",))
def _survey(
    H, W, B, LSE, GA,  # [N, D], [V, D], [V] or None, [N], [N]
    ENERGY, MASS,  # [groups, V] each
    N, V, D, stride_h, stride_wv, stride_wd,
    scale: tl.float64, CAP: tl.constexpr,
    step,  # tokens of a group
    ACC: tl.constexpr, DOT: tl.constexpr, INDEX: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums over a group's tokens, one per column: of (a p)^2 and of a p, a >= 0. Grid: (column blocks, groups)."""
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    col_in = cols < V
    begin = tl.program_id(1) * step
    end = tl.minimum(begin + step, N)
    energy = tl.zeros((BV,), ACC)
    mass = tl.zeros((BV,), ACC)
    for start in range(begin, end, BT):
        rows = start + tl.arange(0, BT)
        row_in = rows < end
        raw = _product(
            H, rows, row_in, stride_h, W, B, cols, col_in, stride_wv, stride_wd, D, ACC, DOT, INDEX, BT, BV, BD
        )
        lse = tl.load(LSE + rows, mask=row_in, other=0.0)[:, None]
        a = tl.load(GA + rows, mask=row_in, other=0.0)[:, None]
        z = tl.where(row_in[:, None] & col_in[None, :], _activate(raw, scale, CAP, ACC) - lse, float("-inf"))
        x = a * tl.exp(z)
        energy += tl.sum(x * x, 0)
        mass += tl.sum(x, 0)
    offsets = tl.program_id(1).to(tl.int64) * V + cols
    tl.store(ENERGY + offsets, energy, mask=col_in)
    tl.store(MASS + offsets, mass, mask=col_in)

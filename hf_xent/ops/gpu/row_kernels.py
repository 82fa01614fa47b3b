"""Raw Triton kernels over stored rows of raw products; `fused` allocates and launches them.

    _row_statistics   z -> the moments of every row, as `algebra.State` has them             1 read
    _row_gradients    z -> dz in its place, and so for the payload                           1 read, 1 write
    _column_sums      z and lse -> sums over tokens, for the sparse tail                     1 read
                      dz -> its sum over tokens, for the bias                                1 read

The first two have one row per program, which keeps one sum per lane and adds them up once, at the end: a tile costs
neither a barrier nor a rescaling, and the loads of later tiles are under way while one is worked on. The moments can do
without the running maximum because they are taken about the label's logit c. Where the maximum turns out to be more
than REACH nats from c, the row is read again and its moments are taken about the maximum itself.

Shapes: n rows, V columns, walked in blocks of BV. A pointer is the capital of its host name; PAY holds the payload's
raw products, a leading G marks a coefficient, a 2 the payload's head. A pointer that is None is a compile-time
constant, so that what was not requested costs nothing.
Numerics: ACC (float32; float64 for float64 logits) holds logits, moments and gradients until they are stored.
Indexing: a row is widened to 64 bits before it is multiplied by a stride: n V exceeds 2^31 in large chunks.
"""

# No `from __future__ import annotations`: Triton reads the annotations of kernel parameters as values.
import triton
import triton.language as tl

from .kernels import _activate, _chain


@triton.jit
def _tile(row, cols, V, scale, CAP: tl.constexpr, ACC: tl.constexpr):
    """Some columns of one row of logits; zero past its end."""
    return _activate(tl.load(row + cols, mask=cols < V, other=0.0).to(ACC), scale, CAP, ACC)


@triton.jit
def _row_sums(
    z_row, pay_row, label, target, c, V, scale, scale2, CAP: tl.constexpr, CAP2: tl.constexpr,
    S1, S2, SP, SQ, SZ, TOP, RANK,  # which sums are wanted: those whose pointer is not None
    ACC: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One visit of a row: every lane's moments about c, its maximum and where that is, and what it has above target."""
    l = tl.zeros((BV,), ACC)
    s1 = tl.zeros((BV,), ACC)
    s2 = tl.zeros((BV,), ACC)
    sp = tl.zeros((BV,), ACC)
    sq = tl.zeros((BV,), ACC)
    sz = tl.zeros((BV,), ACC)
    best = tl.full((BV,), float("-inf"), ACC)
    top = tl.zeros((BV,), tl.int32)
    rank = tl.zeros((BV,), tl.int32)
    for start in tl.range(0, V, BV, num_stages=STAGES):
        cols = start + tl.arange(0, BV)
        z = _tile(z_row, cols, V, scale, CAP, ACC)
        if SZ is not None:
            sz += z
        z = tl.where(cols < V, z, float("-inf"))
        u = z - c
        e = tl.exp(u)
        l += e
        if S1 is not None:
            u = tl.maximum(u, -1e4)  # a banned token adds 0 * -1e4, not 0 * -inf
            s1 += e * u
        if S2 is not None:
            s2 += e * u * u
        if SP is not None:
            sp += e * _tile(pay_row, cols, V, scale2, CAP2, ACC)
        if SQ is not None:
            sq += e * e
        if TOP is not None:
            top = tl.where(z > best, cols, top)
        if RANK is not None:
            rank += ((z > target) & (cols != label)).to(tl.int32)
        best = tl.maximum(best, z)
    return l, s1, s2, sp, sq, sz, best, top, rank


@triton.jit
def _row_statistics(
    Z, PAY, Y,  # [n, V], [n, V] or None, [n]: labels in [0, V)
    TARGET, M, L, S1, S2, SP, SQ, SZ, TOP, RANK,  # [n] each; those from S1 on or None
    V, stride, stride2, scale: tl.float64, scale2: tl.float64, CAP: tl.constexpr, CAP2: tl.constexpr,
    REACH: tl.constexpr, ACC: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The moments of one row about M, which is the label's logit, or the maximum where that is far away."""
    row = tl.program_id(0).to(tl.int64)
    z_row = Z + row * stride
    pay_row = z_row  # not read without a payload
    if PAY is not None:
        pay_row = PAY + row * stride2
    label = tl.load(Y + row).to(tl.int32)
    target = _activate(tl.load(z_row + label).to(ACC), scale, CAP, ACC)
    c = tl.where(target > float("-inf"), target, 0.0)
    l, s1, s2, sp, sq, sz, best, top, rank = _row_sums(
        z_row, pay_row, label, target, c, V, scale, scale2, CAP, CAP2, S1, S2, SP, SQ, SZ, TOP, RANK, ACC, BV, STAGES
    )
    m = tl.max(best, 0)
    if (tl.abs(m - c) > REACH) & (m > float("-inf")):  # rare: the label is e^-REACH as likely as the top
        c = m
        l, s1, s2, sp, sq, _sz, _best, _top, _rank = _row_sums(
            z_row, pay_row, label, target, c, V, scale, scale2, CAP, CAP2, S1, S2, SP, SQ, None, None, None, ACC, BV, 1
        )
    tl.store(TARGET + row, target)
    tl.store(M + row, c)
    tl.store(L + row, tl.sum(l, 0))
    if S1 is not None:
        tl.store(S1 + row, tl.sum(s1, 0))
    if S2 is not None:
        tl.store(S2 + row, tl.sum(s2, 0))
    if SP is not None:
        tl.store(SP + row, tl.sum(sp, 0))
    if SQ is not None:
        tl.store(SQ + row, tl.sum(sq, 0))
    if SZ is not None:
        tl.store(SZ + row, tl.sum(sz, 0))
    if TOP is not None:
        first = tl.min(tl.where(best == m, top, V), 0)  # of the lanes that hold the maximum
        tl.store(TOP + row, tl.where(first < V, first, 0))
    if RANK is not None:
        tl.store(RANK + row, tl.sum(rank, 0))


@triton.jit
def _number(G, row, ACC: tl.constexpr):
    """A coefficient of the row; zero if its pointer is None."""
    number = tl.full((), 0.0, ACC)
    if G is not None:
        number = tl.load(G + row).to(ACC)
    return number


@triton.jit
def _row_gradients(
    Z, PAY, Y, LSE,  # [n, V], [n, V] or None, [n], [n]; labels outside [0, V) have no column here
    GA, GB, GC, GD, GS, GO,  # coefficients [n]; all but GA and GO or None for zero
    SHARE,  # [n] gains sum_j p_tj, or None
    V, stride, stride2, scale: tl.float64, scale2: tl.float64, CAP: tl.constexpr, CAP2: tl.constexpr,
    FACTORED: tl.constexpr, BOTH: tl.constexpr, ACC: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of one row, and with BOTH that of the payload, which is left as it is otherwise.

    With FACTORED the gradient lacks the factor a * scale, or the scale where a is 0.
    """
    row = tl.program_id(0).to(tl.int64)
    z_row = Z + row * stride
    label = tl.load(Y + row).to(tl.int32)
    lse = tl.load(LSE + row).to(ACC)
    a, b, c = _number(GA, row, ACC), _number(GB, row, ACC), _number(GC, row, ACC)
    d, s, o = _number(GD, row, ACC), _number(GS, row, ACC), _number(GO, row, ACC)
    no_softmax = a == 0
    if FACTORED:
        o = tl.where(no_softmax, o, o / tl.where(no_softmax, 1.0, a))
    pay_row = z_row  # not read without its coefficient
    if GD is not None:
        pay_row = PAY + row * stride2
    total = tl.zeros((BV,), ACC)
    for start in tl.range(0, V, BV, num_stages=STAGES):
        cols = start + tl.arange(0, BV)
        z = _tile(z_row, cols, V, scale, CAP, ACC)
        logp = tl.where(cols < V, z - lse, float("-inf"))
        p = tl.exp(logp)
        if SHARE is not None:
            total += p
        if FACTORED:
            dz = tl.where(no_softmax, 0.0, p)
        else:
            logp = tl.maximum(logp, -1e4)  # 0 * -inf of a banned token
            g = a
            if GB is not None:
                g = g + b * logp
            if GC is not None:
                g = g + c * logp * logp
            if GD is not None:
                pay = _tile(pay_row, cols, V, scale2, CAP2, ACC)
                g = g + d * pay
                if BOTH:
                    dpay = _chain(d * p, pay, scale2, CAP2, ACC)
                    tl.store(pay_row + cols, dpay.to(PAY.dtype.element_ty), mask=cols < V)
            dz = p * g
            if GS is not None:
                dz += s
        dz += tl.where(cols == label, o, 0.0)
        if not FACTORED:
            dz = _chain(dz, z, scale, CAP, ACC)
        tl.store(z_row + cols, dz.to(Z.dtype.element_ty), mask=cols < V)
    if SHARE is not None:
        tl.store(SHARE + row, tl.load(SHARE + row) + tl.sum(total, 0))


@triton.jit(do_not_specialize=("n",))
def _column_sums(
    Z,  # [n, V]
    LSE, GA,  # [n] each; LSE or None
    ENERGY, MASS,  # [V] each; ENERGY or None
    n, V, stride, scale: tl.float64, CAP: tl.constexpr,
    ACC: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of a p and (a p)^2, or of a z without LSE. BV columns per program: no other program writes there."""
    cols = tl.program_id(0) * BV + tl.arange(0, BV)
    energy = tl.zeros((BT, BV), ACC)
    mass = tl.zeros((BT, BV), ACC)
    for start in tl.range(0, n, BT, num_stages=STAGES):
        rows = start + tl.arange(0, BT)
        inside = (rows < n)[:, None] & (cols < V)[None, :]
        a = tl.load(GA + rows, mask=rows < n, other=0.0).to(ACC)[:, None]
        offsets = rows.to(tl.int64)[:, None] * stride + cols[None, :]
        z = tl.load(Z + offsets, mask=inside, other=0.0).to(ACC)
        if LSE is not None:
            lse = tl.load(LSE + rows, mask=rows < n, other=0.0).to(ACC)[:, None]
            logp = _activate(z, scale, CAP, ACC) - lse
            z = tl.exp(tl.where(inside, logp, float("-inf")))
        mass += a * z
        if ENERGY is not None:
            energy += a * z * (a * z)
    col_in = cols < V
    if ENERGY is not None:
        tl.store(ENERGY + cols, tl.load(ENERGY + cols, mask=col_in, other=0.0) + tl.sum(energy, 0), mask=col_in)
    tl.store(MASS + cols, tl.load(MASS + cols, mask=col_in, other=0.0) + tl.sum(mass, 0), mask=col_in)

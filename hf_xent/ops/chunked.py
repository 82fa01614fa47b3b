"""Tiles of logits in plain torch: one buffer under the memory budget, worked on in place in cache-sized strips.

Forward: row chunks [n, V], one matmul each, then `_fold`. Backward: column panels [N, v], the matmul again, then dz in
place of z and two matmuls; a panel's weight gradient is written once, in the weight's dtype, and summed nowhere.
Eager: the gradient is taken while a row chunk is alive, three matmuls in all; the weight gradient is a sum over chunks.

A loss of log p_y alone has dz = a (p - r 1_y): the rows of p stay unscaled in the buffer, `a` scales the [N, D] side
matrices instead, and one entry a row is corrected. No pass over [n, V] is spent on the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .algebra import Coefficients, State, coefficients, finish, row_factor
from .head import Head
from .problem import TENSORS, Problem
from .ranks import merge_ranks
from .statistics import wide
from .tail import Survey

TILE_BYTES = 4 << 20  # a strip and its scratch stay in the caches of a CPU; smaller ones cost more calls than they save
PANEL, GROUP = 512, 4  # columns of a narrow product and how many a batch: their scratch stays in the cache
GPU_TILE_BYTES = 64 << 20  # on accelerators a strip only bounds the scratch
FEW = 256  # rows
# Chunks whose weight gradients are summed in the weight's own dtype; each rounds the sum once more. Measured on 2044
# real tokens of SmolLM2 in bfloat16, error of the weight gradient over that of dense torch: 1.04 for 4 chunks, 1.12 for
# 16, 1.20 for 32 (the rounding of the logits and of their gradient weighs more).
ROUNDINGS = 16


def forward(problem: Problem) -> dict[str, Tensor]:
    """Every requested statistic, [N] each."""
    buffers = _Buffers(problem, problem.rows())
    parts = [_fold_chunk(problem, rows, buffers.load(rows), keep=False) for rows in problem.rows()]
    return _cat(parts, problem)


def backward(
    problem: Problem, values: Mapping[str, Tensor], grads: Mapping[str, Tensor], share: Tensor | None = None
) -> dict[str, Tensor]:
    """Gradients of `sum(grads * statistics)` for every tensor in `problem.needs`.

    `problem` may hold some columns of a larger vocabulary, `values` being of the whole; labels outside [0, V) then have
    no column here. `share` [N], if given, gains the softmax mass of the columns (plain coefficients only).
    """
    everything, panels = slice(0, len(problem.labels)), problem.columns()
    buffers, out = _Buffers(problem, [everything], panels), _Gradients(problem, [everything], panels)
    coef, places = coefficients(values, grads, problem.head.vocabulary), problem.label_columns
    for cols in panels:
        z, pay = buffers.load(everything, cols)
        _dlogits_(problem, (z, pay), places - cols.start, values["lse"], coef, share)
        out.push(everything, cols, z, pay, coef)
    return out.finish()


def eager(
    problem: Problem, objective: Callable[[slice, dict[str, Tensor]], dict[str, Tensor]], uses: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Statistics and gradients in one visit of each chunk.

    `objective(rows, values)` gives the upstream gradients of the chunk's statistics; `uses` says which they can be.
    A low-precision weight gradient in many chunks would need a wide sum of its own, twice its size: then there are two
    visits, `forward` and `backward`.
    """
    chunks, everything = problem.rows(), slice(0, problem.head.size)
    if wide(problem.hidden.dtype) != problem.hidden.dtype and len(chunks) > ROUNDINGS:
        values = merge_ranks(problem, forward(problem))
        return values, backward(problem, values, objective(slice(0, len(problem.labels)), values))
    buffers, out, parts = _Buffers(problem, chunks), _Gradients(problem, chunks, [everything]), []
    plain = problem.head.softcap is None and set(uses) <= {"lse", "target"}
    for rows in chunks:
        z, pay = buffers.load(rows)
        own = _fold_chunk(problem, rows, (z, pay), keep=True, softmax=plain)
        values = merge_ranks(problem, own, rows)
        coef = coefficients(values, objective(rows, values), problem.head.vocabulary)
        if plain:
            if values is not own:  # the softmax in z is over this rank's columns
                coef = replace(coef, a=coef.a * (own["lse"] - values["lse"]).exp())
            _spike_(z, problem.label_columns[rows], coef)
        else:
            _dlogits_(problem, (z, pay), problem.label_columns[rows], values["lse"], coef)
        out.push(rows, everything, z, pay, coef)
        parts.append(values)
    return _cat(parts, problem), out.finish()


def survey(
    problem: Problem, objective: Callable[[slice, dict[str, Tensor]], dict[str, Tensor]], groups: list[slice]
) -> Survey:
    """Statistics, coefficients, and what `tail` needs to know of every column, in one visit."""
    buffers = _Buffers(problem, problem.rows())
    dtype, size = wide(problem.hidden.dtype), problem.head.size
    energy, mass = (problem.hidden.new_zeros(count, size, dtype=dtype) for count in (1, len(groups)))
    unit = problem.hidden.new_zeros((), dtype=dtype)
    parts, coefs = [], []
    for rows in problem.rows():
        p, _ = buffers.load(rows)
        parts.append(_fold_chunk(problem, rows, (p, None), keep=True, softmax=True))
        coefs.append(coefficients(parts[-1], objective(rows, parts[-1]), size))
        a = coefs[-1].a.abs()
        largest = torch.maximum(unit, a.amax())
        shrink = torch.where(largest > 0, unit / largest, 1.0)  # sums so far, in the new unit
        energy *= shrink**2
        mass *= shrink
        unit, a = largest, a / torch.where(largest > 0, largest, 1.0)
        for group, sums in zip(groups, mass, strict=True):
            here = slice(max(0, group.start - rows.start), max(0, min(len(p), group.stop - rows.start)))
            if here.start < here.stop:
                _add_columns(p[here], a[here], energy[0], sums)
    coef = Coefficients(a=torch.cat([c.a for c in coefs]), o=torch.cat([c.o for c in coefs]))
    return Survey(_cat(parts, problem), coef, energy[0], mass)


def _add_columns(p: Tensor, a: Tensor, energy: Tensor, mass: Tensor) -> None:
    """energy [V] += sum_t (a_t p_tj)^2 and mass [V] += sum_t a_t p_tj."""
    if kernels := _kernels(p):
        kernels.column_sums(p, a, energy, mass)
        return
    for tile, strip in _strips(p):
        mass.addmv_(strip.T, a[tile])
        energy.addmv_(strip.square().T, a[tile] ** 2)


def _kernels(z: Tensor) -> ModuleType | None:
    """One pass over the logits instead of several, on a GPU with Triton."""
    return _triton() if z.is_cuda else None


@cache
def _triton() -> ModuleType | None:
    try:
        from .gpu import fused  # imported here: triton is optional, and slow to import
    except ImportError:
        return None
    return fused


class _Buffers:
    """The preallocated logits of one tile, and the payload's beside them."""

    def __init__(self, problem: Problem, rows: list[slice], cols: list[slice] | None = None):
        self.problem = problem
        cols = cols or [slice(0, problem.head.size)]
        size = max((r.stop - r.start for r in rows), default=0) * max(c.stop - c.start for c in cols)
        self.z = problem.hidden.new_empty(size)
        self.pay = None if problem.payload is None else problem.payload[0].new_empty(size)

    def load(self, rows: slice, cols: slice | None = None) -> tuple[Tensor, Tensor | None]:
        """Raw products (before scale and softcap) of a tile; overwrites the last one's."""
        problem, cols = self.problem, cols or slice(0, self.problem.head.size)
        shape = (rows.stop - rows.start, cols.stop - cols.start)
        count = shape[0] * shape[1]
        z = _project(problem.hidden[rows], problem.head[cols], self.z[:count].view(shape))
        if problem.payload is None or self.pay is None:
            return z, None
        return z, _project(problem.payload[0][rows], problem.payload[1][cols], self.pay[:count].view(shape))


def _project(hidden: Tensor, head: Head, out: Tensor) -> Tensor:
    """The raw products of a chunk, written to `out` [n, V]."""
    if head.adapter is not None:
        width = head.weight.shape[1]
        _project(hidden[:, :width], replace(head, adapter=None), out)
        return out.addmm_(hidden[:, width:], head.adapter.T)
    panels = head.size // PANEL
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32 and panels >= 2 * GROUP and len(hidden) > 1:
        _project_by_panels(hidden, head.weight, out)
        return out if head.bias is None else out.add_(head.bias)
    if head.bias is None:
        return torch.mm(hidden, head.weight.T, out=out)
    return torch.addmm(head.bias, hidden, head.weight.T, out=out)


def _project_by_panels(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """The same by batches of narrow products: for few rows and a wide head, a CPU's BLAS runs these faster."""
    rows, step = len(hidden), GROUP * PANEL
    scratch = hidden.new_empty(GROUP, rows, PANEL)
    many = hidden.expand(GROUP, *hidden.shape)
    whole = weight.shape[0] // step * step
    for i in range(0, whole, step):
        torch.bmm(many, weight[i : i + step].unflatten(0, (GROUP, PANEL)).transpose(1, 2), out=scratch)
        out[:, i : i + step].unflatten(1, (GROUP, PANEL)).copy_(scratch.transpose(0, 1))
    if whole < weight.shape[0]:
        torch.mm(hidden, weight[whole:].T, out=out[:, whole:])


def _tiles(z: Tensor) -> Iterator[slice]:
    budget = TILE_BYTES if z.device.type == "cpu" else GPU_TILE_BYTES
    step = max(1, budget // (z.shape[1] * 4))
    return (slice(i, i + step) for i in range(0, z.shape[0], step))


def _strips(z: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Row strips of z, each with its rows in a wide dtype: themselves, or a scratch that the next strip overwrites."""
    scratch = None
    for tile in _tiles(z):
        strip = z[tile]
        if z.dtype != wide(z.dtype):
            scratch = torch.empty_like(strip, dtype=wide(z.dtype)) if scratch is None else scratch
            strip = scratch[: len(strip)].copy_(strip)
        yield tile, strip


def _cat(parts: list[dict[str, Tensor]], problem: Problem) -> dict[str, Tensor]:
    if parts:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    integers = ("top", "rank")
    dtype = wide(problem.hidden.dtype)
    return {k: problem.hidden.new_empty(0, dtype=torch.int64 if k in integers else dtype) for k in problem.outputs}


def _fold_chunk(
    problem: Problem, rows: slice, loaded: tuple[Tensor, Tensor | None], *, keep: bool, softmax: bool = False
) -> dict[str, Tensor]:
    """Statistics of one chunk. `keep` leaves the raw products in place, or p with `softmax`; else they may be spent."""
    z, pay = loaded
    labels = problem.label_columns[rows]
    if problem.head.shard is not None:  # `merge_ranks` drops the targets of labels that other ranks have
        labels = labels.clamp(0, problem.head.size - 1)
    kernels = _kernels(z) if pay is None and problem.head.softcap is None else None
    if kernels and problem.outputs <= kernels.GIVEN:
        values = kernels.softmax_(z, labels, problem.head, spend=softmax)
        return {name: values[name] for name in problem.outputs}
    parts, scratch = [], z.dtype != wide(z.dtype)
    for tile, strip in _strips(z):
        tile_pay = None if pay is None or problem.payload is None else problem.payload[1].activate(_wide(pay[tile]))
        values, e, l = _fold(problem, strip, labels[tile], tile_pay, spend=softmax or scratch or not keep)
        if softmax:
            torch.div(e, l[:, None], out=e)
            if e.data_ptr() != z[tile].data_ptr():
                z[tile] = e
        parts.append(values)
    return _cat(parts, problem)


def _wide(x: Tensor) -> Tensor:
    return x.to(wide(x.dtype))


def _fold(
    problem: Problem, raw: Tensor, labels: Tensor, pay: Tensor | None, *, spend: bool
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Statistics of one wide strip, its e^u and their sum; with `spend`, e^u takes the place of `raw`.

    torch.softmax would be a little faster, but sums a long row in order: over 262144 columns its float32 gradients err
    by 2.5e-5, these by 2e-6.
    """
    ask = problem.outputs
    z = problem.head.activate(raw)
    m = z.amax(-1)
    target = z.gather(-1, labels[:, None])
    top = z.argmax(-1) if "top" in ask else None
    rank = (z > target).sum(-1) if "rank" in ask else None
    sz = z.sum(-1) if "mean" in ask else None
    u = z.sub_(m[:, None]) if spend or z is not raw else z - m[:, None]
    s1 = s2 = None
    if ask & {"entropy", "variance"}:
        e = u.exp()
        u.clamp_(min=-1e4)  # a banned token (z = -inf) adds nothing: 0 * -1e4, not 0 * -inf
        s1 = torch.linalg.vecdot(e, u)
        s2 = torch.linalg.vecdot(e, u.square_()) if "variance" in ask else None
        e = u.copy_(e) if spend and u.data_ptr() == raw.data_ptr() else e
    else:
        e = u.exp_()
    l = e.sum(-1)
    sp = None if pay is None else torch.linalg.vecdot(e, pay)
    sq = torch.linalg.vecdot(e, e) if "log_sum_sq" in ask else None
    state = State(m=m, l=l, s1=s1, s2=s2, sp=sp, sq=sq, sz=sz, top=top, rank=rank)
    values = finish(state, target.squeeze(-1), problem.head.size)
    return {name: values[name] for name in ask}, e, l


def _spike_(p: Tensor, labels: Tensor, coef: Coefficients) -> None:
    """p -> dz / a in place: the label's entry gains o / a. Where a is 0, dz is o 1_y and `push` scales rows by 1."""
    dead = coef.a == 0
    if p.device.type != "cpu" or bool(dead.any()):
        p.mul_(~dead[:, None])  # such rows have no softmax part at all
    here, spike = _at(labels, p.shape[1], torch.where(dead, coef.o, coef.o / coef.a))
    rows = torch.arange(len(labels), device=p.device)
    p[rows, here] = (p[rows, here].to(spike.dtype) + spike).to(p.dtype)


def _at(labels: Tensor, size: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """Labels as indices into `size` columns, and what to add there: nothing where a label is none of them."""
    return labels.clamp(0, size - 1), torch.where((labels >= 0) & (labels < size), value, 0.0)


def _dlogits_(
    problem: Problem,
    loaded: tuple[Tensor, Tensor | None],
    labels: Tensor,
    lse: Tensor,
    coef: Coefficients,
    share: Tensor | None = None,
) -> None:
    """Raw products -> their gradient (over a, for plain coefficients), and the payload's likewise, in place.

    `labels` count from the tile's first column.
    """
    z, pay = loaded
    plain = coef.plain and problem.head.softcap is None
    if plain and (kernels := _kernels(z)):
        kernels.softmax_(z, labels, problem.head, lse=lse, share=share)
        return _spike_(z, labels, coef)
    if not plain:
        for tile in _tiles(z):
            _dlogits_tile_(problem, z[tile], None if pay is None else pay[tile], lse[tile], labels[tile], coef[tile])
        return
    for tile, strip in _strips(z):
        p = problem.head.activate(strip)
        p = p.sub_(lse[tile, None]).exp_()
        if share is not None:
            share[tile] += p.sum(-1)
        if p.data_ptr() != z[tile].data_ptr():
            z[tile] = p
    _spike_(z, labels, coef)


def _dlogits_tile_(
    problem: Problem, raw: Tensor, raw_pay: Tensor | None, lse: Tensor, labels: Tensor, coef: Coefficients
) -> None:
    """The polynomial of the design on one strip."""
    z = problem.head.activate(_wide(raw))
    logp = z - lse[:, None]
    p = logp.exp()
    logp.clamp_(min=-1e4)
    g = coef.a[:, None]
    if coef.b is not None:
        g = g + coef.b[:, None] * logp
    if coef.c is not None:
        g = g + coef.c[:, None] * logp.square()
    if coef.d is not None and raw_pay is not None and problem.payload is not None:
        head = problem.payload[1]
        pay = head.activate(_wide(raw_pay))
        g = g + coef.d[:, None] * pay
        raw_pay.copy_(coef.d[:, None] * p * head.slope(pay))
    dz = p * g
    if coef.s is not None:
        dz += coef.s[:, None]
    here, spike = _at(labels, dz.shape[1], coef.o)
    dz.scatter_add_(-1, here[:, None], spike[:, None])
    raw.copy_(dz.mul_(problem.head.slope(z)))


class _Gradients:
    """The gradients of tiles: written by the first that meets a row or column, added to by the others.

    Rows of the hidden gradient gather over column panels, in a wide dtype if there are several; columns of the weight
    gradient gather over row chunks, in the weight's own.
    """

    def __init__(self, problem: Problem, rows: list[slice], cols: list[slice]):
        self.problem = problem
        self.last = cols[-1]
        self.likes = {name: t for name, t in zip(TENSORS, problem.tensors, strict=True) if t is not None}
        self.sums = {name: self._start(name, not rows, len(cols) > 1) for name in problem.needs}

    def _start(self, name: str, empty: bool, several: bool) -> Tensor:
        tensor = self.likes[name]
        keep = "weight" in name or name == "adapter" or ("hidden" in name and not several)
        dtype = tensor.dtype if keep else wide(tensor.dtype)
        # the payload's are not written where no upstream gradient reaches it
        start = torch.zeros_like if empty or "payload" in name or "bias" in name else torch.empty_like
        return start(tensor, dtype=dtype, memory_format=torch.contiguous_format)

    def push(self, rows: slice, cols: slice, dz: Tensor, dpay: Tensor | None, coef: Coefficients) -> None:
        """Chain rule of the head for one tile. For plain coefficients `dz` lacks the row factor a * scale."""
        head, factor = self.problem.head, None
        if coef.plain and head.softcap is None:
            factor = row_factor(coef, head)
        self._head("", rows, cols, dz, factor, self.problem.hidden, head)
        if dpay is not None and self.problem.payload is not None and coef.d is not None:
            self._head("payload_", rows, cols, dpay, None, *self.problem.payload)

    def _head(
        self, prefix: str, rows: slice, cols: slice, dz: Tensor, factor: Tensor | None, hidden: Tensor, head: Head
    ) -> None:
        for name, (matrix, features) in head.matrices.items():
            if prefix + "hidden" in self.sums:
                dh = self.sums[prefix + "hidden"][rows, features]
                _matmul_into(dh, dz, matrix[cols], first=cols.start == 0)
                if factor is not None and cols == self.last:
                    dh.mul_(factor)
            if prefix + name in self.sums:
                side = hidden[rows, features]
                side = side if factor is None else (side * factor).to(hidden.dtype)
                _matmul_into(self.sums[prefix + name][cols], dz.T, side, first=rows.start == 0)
        if prefix + "bias" in self.sums:
            db = self.sums[prefix + "bias"][cols]
            ones = torch.ones_like(dz[:, :1], dtype=db.dtype) if factor is None else factor
            for tile, strip in _strips(dz):
                db.addmv_(strip.T, ones[tile].squeeze(-1).to(db.dtype))

    def finish(self) -> dict[str, Tensor]:
        return {name: total.to(self.likes[name].dtype) for name, total in self.sums.items()}


def _matmul_into(total: Tensor, x: Tensor, y: Tensor, *, first: bool) -> None:
    """total = x @ y for the first, total += x @ y after; a wider total is added to in its own dtype."""
    if total.dtype != x.dtype:
        product = torch.mm(x, y)
        total.copy_(product) if first else total.add_(product)
    elif first and x.dtype == torch.float32 and len(x) <= FEW and x.device.type == "cpu":
        # of few rows over a long inner dimension a CPU's BLAS computes the transpose faster, by a tenth
        total.copy_(torch.mm(y.T, x.T).T)
    elif first:
        torch.mm(x, y, out=total)
    else:
        total.addmm_(x, y)

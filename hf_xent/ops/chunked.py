"""Row chunks in plain torch: one buffer of logits under the memory budget, worked on in place in cache-sized tiles.

Forward: one matmul a chunk, then `_fold`. Backward: the matmul again, then dz in place of z (`_dlogits_`) and two
matmuls (`_push`). Eager: the gradient is taken while the chunk is alive, three matmuls in all.

A loss of log p_y alone has dz = a (p - r 1_y): the rows of p stay unscaled in the buffer, `a` scales the [n, D] side
matrices instead, and one entry a row is corrected. No pass over [n, V] is spent on the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from .algebra import TENSORS, Coefficients, Head, Problem, State, coefficients, finish, wide

TILE_BYTES = 1 << 20  # a tile and its scratch stay in the second-level cache of a CPU core
PANEL, GROUP = 512, 4  # columns of a narrow product and how many a batch: their scratch stays in the cache
GPU_TILE_BYTES = 64 << 20  # on accelerators a tile only bounds the scratch


def forward(problem: Problem) -> dict[str, Tensor]:
    """Every requested statistic, [N] each."""
    buffers = _Buffers(problem)
    parts = [_fold_chunk(problem, rows, buffers.load(rows), keep=False) for rows in problem.chunks()]
    return _cat(parts, problem)


def backward(problem: Problem, values: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of `sum(grads * statistics)` for every tensor in `problem.needs`."""
    buffers, out = _Buffers(problem), _Gradients(problem)
    coef = coefficients(values, grads, problem.head.size)
    for rows in problem.chunks():
        z, pay = buffers.load(rows)
        _dlogits_(problem, rows, z, pay, values["lse"][rows], coef[rows])
        out.push(rows, z, pay, coef[rows])
    return out.finish()


def eager(
    problem: Problem, objective: Callable[[slice, dict[str, Tensor]], dict[str, Tensor]], uses: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Statistics and gradients in one visit of each chunk.

    `objective(rows, values)` gives the upstream gradients of the chunk's statistics; `uses` says which they can be.
    """
    buffers, out, parts = _Buffers(problem), _Gradients(problem), []
    plain = problem.head.softcap is None and set(uses) <= {"lse", "target"}
    for rows in problem.chunks():
        z, pay = buffers.load(rows)
        values = _fold_chunk(problem, rows, (z, pay), keep=True, softmax=plain)
        coef = coefficients(values, objective(rows, values), problem.head.size)
        if plain:
            _spike_(z, problem.labels[rows], coef)
        else:
            _dlogits_(problem, rows, z, pay, values["lse"], coef)
        out.push(rows, z, pay, coef)
        parts.append(values)
    return _cat(parts, problem), out.finish()


class _Buffers:
    """The preallocated logits of one chunk, and the payload's beside them."""

    def __init__(self, problem: Problem):
        self.problem = problem
        rows = next(problem.chunks(), slice(0, 0)).stop
        self.z = problem.hidden.new_empty(rows, problem.head.size)
        self.pay = None if problem.payload is None else problem.payload[0].new_empty(rows, problem.head.size)

    def load(self, rows: slice) -> tuple[Tensor, Tensor | None]:
        """Raw products (before scale and softcap) of these rows; overwrites the last chunk's."""
        problem, count = self.problem, rows.stop - rows.start
        z = _project(problem.hidden[rows], problem.head, self.z[:count])
        if problem.payload is None or self.pay is None:
            return z, None
        return z, _project(problem.payload[0][rows], problem.payload[1], self.pay[:count])


def _project(hidden: Tensor, head: Head, out: Tensor) -> Tensor:
    """The raw products of a chunk, written to `out` [n, V]."""
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
    labels = problem.labels[rows]
    parts = []
    for tile in _tiles(z):
        tile_pay = None if pay is None or problem.payload is None else problem.payload[1].activate(_wide(pay[tile]))
        values, e, l = _fold(problem, z[tile], labels[tile], tile_pay, spend=softmax or not keep)
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
    """Statistics of one tile, its e^u and their sum; with `spend`, e^u takes the place of a wide `raw`."""
    ask = problem.outputs
    z = problem.head.activate(_wide(raw))
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
    rows = torch.arange(len(labels), device=p.device)
    dead = coef.a == 0
    if p.device.type != "cpu" or bool(dead.any()):
        p.mul_(~dead[:, None])  # such rows have no softmax part at all
    p[rows, labels] = (p[rows, labels].to(coef.a.dtype) + torch.where(dead, coef.o, coef.o / coef.a)).to(p.dtype)


def _dlogits_(problem: Problem, rows: slice, z: Tensor, pay: Tensor | None, lse: Tensor, coef: Coefficients) -> None:
    """Raw products -> their gradient (over a, for plain coefficients), and the payload's likewise, in place."""
    plain = coef.plain and problem.head.softcap is None
    for tile in _tiles(z):
        if plain:
            p = problem.head.activate(_wide(z[tile]))
            p = p.sub_(lse[tile, None]).exp_()
            if p.dtype != z.dtype or p.data_ptr() != z[tile].data_ptr():
                z[tile] = p
        else:
            _dlogits_tile_(
                problem, z[tile], None if pay is None else pay[tile], lse[tile], problem.labels[rows][tile], coef[tile]
            )
    if plain:
        _spike_(z, problem.labels[rows], coef)


def _dlogits_tile_(
    problem: Problem, raw: Tensor, raw_pay: Tensor | None, lse: Tensor, labels: Tensor, coef: Coefficients
) -> None:
    """The polynomial of the design on one tile."""
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
    dz.scatter_add_(-1, labels[:, None], coef.o[:, None])
    raw.copy_(dz.mul_(problem.head.slope(z)))


class _Gradients:
    """Accumulators of the chunks' gradients. More than one chunk of a low-precision weight is summed in float32."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.several = sum(1 for _ in problem.chunks()) != 1
        self.likes = {name: t for name, t in zip(TENSORS, problem.tensors, strict=True) if t is not None}
        self.sums = {name: self._start(name) for name in problem.needs}

    def _start(self, name: str) -> Tensor:
        tensor = self.likes[name]
        if name == "hidden":
            return torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if name == "payload_hidden":  # not written where no upstream gradient reaches the payload
            return torch.zeros_like(tensor, memory_format=torch.contiguous_format)
        return torch.zeros_like(tensor, dtype=wide(tensor.dtype) if self.several or "bias" in name else None)

    def push(self, rows: slice, dz: Tensor, dpay: Tensor | None, coef: Coefficients) -> None:
        """Chain rule of the head for one chunk. For plain coefficients `dz` lacks the row factor a * scale."""
        head, factor = self.problem.head, None
        if coef.plain and head.softcap is None:
            factor = torch.where(coef.a == 0, 1.0, coef.a)[:, None] * head.scale
        self._head("", rows, dz, factor, self.problem.hidden, head)
        if dpay is not None and self.problem.payload is not None and coef.d is not None:
            self._head("payload_", rows, dpay, None, *self.problem.payload)

    def _head(self, prefix: str, rows: slice, dz: Tensor, factor: Tensor | None, hidden: Tensor, head: Head) -> None:
        if prefix + "hidden" in self.sums:
            dh = torch.mm(dz, head.weight, out=self.sums[prefix + "hidden"][rows])
            if factor is not None:
                dh.mul_(factor)
        if prefix + "weight" in self.sums:
            side = hidden[rows] if factor is None else (hidden[rows] * factor).to(hidden.dtype)
            _addmm_(self.sums[prefix + "weight"], dz.T, side)
        if prefix + "bias" in self.sums:
            ones = torch.ones_like(dz[:, :1], dtype=self.sums[prefix + "bias"].dtype) if factor is None else factor
            self.sums[prefix + "bias"] += torch.mv(_wide(dz).T, ones.squeeze(-1).to(self.sums[prefix + "bias"].dtype))

    def finish(self) -> dict[str, Tensor]:
        return {name: total.to(self.likes[name].dtype) for name, total in self.sums.items()}


def _addmm_(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total += x @ y with a total that may be wider than x and y: then by stripes, so that no second [V, D] exists."""
    if total.dtype == x.dtype:
        total.addmm_(x, y)
        return
    stripe = max(1, TILE_BYTES * 8 // (y.shape[1] * y.element_size()))
    for i in range(0, total.shape[0], stripe):
        total[i : i + stripe] += torch.mm(x[i : i + stripe], y)

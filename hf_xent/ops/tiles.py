"""One tile of stored logits in plain torch, in place, in strips that fit the cache: its statistics, then its gradient.

    fold             raw products -> statistics
    softmax_         raw products -> statistics, and e with p = e / total
    dlogits_         raw products -> their gradient dz
    add_label_term_  p -> dz / a, for a loss of log p_y alone: dz = a (p - r 1_y), which differs in one entry per row
    add_columns      p, or raw products -> sums over tokens, for the sparse tail
    add_rows         dz -> its sum over tokens, for the bias

Functions whose names end in _ write over their argument. On a GPU with Triton, `gpu.fused` reads the logits once for
each of the first two, and for the sums of the tail; p is never written there.
Shapes: n tokens of the tile, V columns. A strip is processed in the dtype of statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from .algebra import Coefficients, State, finish
from .gpu.launch import can_launch
from .head import Head
from .problem import Problem
from .statistics import wide, widened

# A strip and its scratch memory stay in the caches of a CPU; smaller strips would cost more in calls than they save. On
# accelerators a strip only bounds the scratch memory.
STRIP_BYTES, GPU_STRIP_BYTES = 4 << 20, 64 << 20
BLOCK = 512  # columns of which the maximum is looked for at once


def fold(problem: Problem, rows: slice, products: tuple[Tensor, Tensor | None], *, keep: bool) -> dict[str, Tensor]:
    """Statistics of one chunk. `keep` leaves the raw products in place; else they may be lost."""
    z, pay = products
    if problem.mean_weight is None and (kernels := _kernels(z)) is not None:  # which have no weighted mean
        return kernels.statistics(problem, z, pay, problem.readable_columns[rows])
    overwrite = not keep or z.dtype != wide(z.dtype)
    return concatenate([values for _, values, _, _ in _folds(problem, rows, products, overwrite)], problem)


def softmax_(problem: Problem, rows: slice, products: tuple[Tensor, Tensor | None]) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics of one chunk, and e with p = e / total in place of its raw products; total is [n].

    For tiles without kernels: `has_kernels` tells.
    """
    z, parts, totals = products[0], [], []
    for span, values, e, total in _folds(problem, rows, products, overwrite=True):
        if e.data_ptr() != z[span].data_ptr():
            z[span] = e
        parts.append(values)
        totals.append(total)
    return concatenate(parts, problem), torch.cat(totals) if totals else z.new_empty(0, dtype=wide(z.dtype))


def _folds(
    problem: Problem, rows: slice, products: tuple[Tensor, Tensor | None], overwrite: bool
) -> Iterator[tuple[slice, dict[str, Tensor], Tensor, Tensor]]:
    """Strip by strip: its rows, and what `_fold_strip` returns."""
    (z, pay), labels = products, problem.readable_columns[rows]
    for span, strip in strips(z):
        strip_pay = None if pay is None or problem.payload is None else problem.payload[1].activate(widened(pay[span]))
        yield span, *_fold_strip(problem, strip, labels[span], strip_pay, overwrite=overwrite)


def _fold_strip(
    problem: Problem, raw: Tensor, labels: Tensor, pay: Tensor | None, *, overwrite: bool
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Statistics of one wide strip, and e and total of p = e / total; with `overwrite`, e takes the place of `raw`."""
    outputs = problem.outputs
    z = problem.head.activate(raw)
    overwrite = overwrite or z is not raw
    m, top = _argmax(z) if "top" in outputs else (z.amax(-1), None)
    target = z.gather(-1, labels[:, None])
    rank = (z > target).sum(-1) if "rank" in outputs else None
    weight = problem.column_weight
    sz = None if "mean" not in outputs else z.sum(-1) if weight is None else z @ weight
    s1 = s2 = None
    if moments := outputs & {"entropy", "variance"}:
        u = z.sub_(m[:, None]) if overwrite else z - m[:, None]
        e = u.exp()
        u.clamp_(min=-1e4)  # a banned token (z = -inf) adds nothing: 0 * -1e4, not 0 * -inf
        s1 = torch.linalg.vecdot(e, u)
        s2 = torch.linalg.vecdot(e, u.square_()) if "variance" in outputs else None
        e = u.copy_(e) if u.data_ptr() == raw.data_ptr() else e
    else:
        e = torch.softmax(z, -1, out=z) if overwrite else z.softmax(-1)
    # torch's softmax sums a long row in order: over 262144 columns its normalizer errs by 2.5e-5, this sum by 2e-6
    total = e.sum(-1)
    largest = 1.0 if moments else e.amax(-1)
    state = State(
        m=m,
        l=total / largest,
        s1=s1,
        s2=s2,
        sp=None if pay is None else torch.linalg.vecdot(e, pay) / largest,
        sq=torch.linalg.vecdot(e, e) / largest**2 if "log_sum_sq" in outputs else None,
        sz=sz,
        top=top,
        rank=rank,
    )
    values = finish(state, target.squeeze(-1), problem.head.size)
    return {name: values[name] for name in outputs}, e, total


def _argmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each row and its first column, by blocks: torch has vector code for amax, but not for argmax."""
    size = z.shape[1]
    if size < 2 * BLOCK:
        return z.amax(-1), z.argmax(-1)
    whole = size // BLOCK * BLOCK
    maxima = z[:, :whole].unflatten(-1, (-1, BLOCK)).amax(-1)
    if whole < size:
        maxima = torch.cat([maxima, z[:, whole:].amax(-1, keepdim=True)], -1)
    start = (maxima.argmax(-1, keepdim=True) * BLOCK).clamp(max=size - BLOCK)
    block = z.gather(-1, start + torch.arange(BLOCK, device=z.device))
    return maxima.amax(-1), start.squeeze(-1) + block.argmax(-1)


def concatenate(parts: list[dict[str, Tensor]], problem: Problem) -> dict[str, Tensor]:
    """The statistics of all rows from those of their parts, of which there may be none."""
    if parts:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    integers = ("top", "rank")
    dtype = wide(problem.hidden.dtype)
    return {k: problem.hidden.new_empty(0, dtype=torch.int64 if k in integers else dtype) for k in problem.outputs}


def dlogits_(
    problem: Problem,
    products: tuple[Tensor, Tensor | None],
    labels: Tensor,
    lse: Tensor,
    coef: Coefficients,
    share: Tensor | None = None,
) -> None:
    """Raw products -> their gradient (divided by a, for plain coefficients), and so for the payload's if it has one.

    `labels` count from the tile's first column. The softmax mass of the columns is added to `share` [n], if any.
    """
    z, pay = products
    if problem.mean_weight is None and (kernels := _kernels(z)) is not None:
        return kernels.dlogits_(problem, products, labels, lse, coef, share)
    if not (coef.plain and problem.head.softcap is None):
        for span in _spans(z):
            _dlogits_strip_(problem, z[span], None if pay is None else pay[span], lse[span], labels[span], coef[span])
        return
    for span, strip in strips(z):
        p = problem.head.activate(strip)
        p = p.sub_(lse[span, None]).exp_()
        if share is not None:
            share[span] += p.sum(-1)
        if p.data_ptr() != z[span].data_ptr():
            z[span] = p
    add_label_term_(z, labels, coef)


def _dlogits_strip_(
    problem: Problem, raw: Tensor, raw_pay: Tensor | None, lse: Tensor, labels: Tensor, coef: Coefficients
) -> None:
    """dz of one strip, by the formula in `algebra`."""
    z = problem.head.activate(widened(raw))
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
        pay = head.activate(widened(raw_pay))
        g = g + coef.d[:, None] * pay
        raw_pay.copy_(coef.d[:, None] * p * head.slope(pay))
    dz = p * g
    if coef.s is not None:
        dz += coef.s[:, None] if coef.w is None else coef.s[:, None] * coef.w
    columns, term = _label_term(labels, dz.shape[1], coef.o)
    dz.scatter_add_(-1, columns[:, None], term[:, None])
    raw.copy_(dz.mul_(problem.head.slope(z)))


def add_label_term_(p: Tensor, labels: Tensor, coef: Coefficients) -> None:
    """p -> dz / a in place: o / a is added to the label's entry. Where a is 0, the row becomes dz = o 1_y itself.

    `algebra.row_factor` multiplies by a later, and by 1 where a is 0.
    """
    no_softmax = coef.a == 0
    if p.device.type != "cpu" or bool(no_softmax.any()):  # asking an accelerator would wait for it
        p.mul_(~no_softmax[:, None])  # dz has no softmax part there
    columns, term = _label_term(labels, p.shape[1], torch.where(no_softmax, coef.o, coef.o / coef.a))
    rows = torch.arange(len(labels), device=p.device)
    p[rows, columns] = (p[rows, columns].to(term.dtype) + term).to(p.dtype)


def _label_term(labels: Tensor, size: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """Labels as indices into `size` columns, and the values to add there: 0 for a label that is none of them."""
    return labels.clamp(0, size - 1), torch.where((labels >= 0) & (labels < size), value, 0.0)


def add_columns(head: Head, z: Tensor, lse: Tensor | None, a: Tensor, energy: Tensor, mass: Tensor) -> None:
    """energy [V] += sum_t (a_t p_tj)^2 and mass [V] += sum_t a_t p_tj, for rows of p, or with `lse` of raw products."""
    if (kernels := _kernels(z)) is not None:
        return kernels.column_sums(head, z, lse, a, energy, mass)
    for span, strip in strips(z):
        mass.addmv_(strip.T, a[span])
        energy.addmv_(strip.square().T, a[span] ** 2)


def add_rows(total: Tensor, rows: Tensor, weights: Tensor) -> None:
    """total [V] += sum_t weights_t rows_tj, in the dtype of total, which is that of statistics."""
    if (kernels := _kernels(rows)) is not None:
        return kernels.add_rows(total, rows, weights)
    for span, strip in strips(rows):
        total.addmv_(strip.T, weights[span].to(total.dtype))


def strips(z: Tensor, parts: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """Strips of z by its first dimension, in a wide dtype: the rows of z, or a copy that the next strip overwrites.

    Of work that holds several tensors like a strip, `parts` tells how many fit the cache together.
    """
    scratch = None
    for span in _spans(z, parts):
        strip = z[span]
        if z.dtype != wide(z.dtype):
            scratch = torch.empty_like(strip, dtype=wide(z.dtype)) if scratch is None else scratch
            strip = scratch[: len(strip)].copy_(strip)
        yield span, strip


def _spans(z: Tensor, parts: int = 1) -> Iterator[slice]:
    """The rows of each strip."""
    budget = (STRIP_BYTES if z.device.type == "cpu" else GPU_STRIP_BYTES) // parts
    step = max(1, budget // (z.shape[1:].numel() * 4))
    return (slice(i, i + step) for i in range(0, z.shape[0], step))


def has_kernels(z: Tensor) -> bool:
    """Whether one pass over the raw products gives what takes several in torch, so that p need not be kept."""
    return _kernels(z) is not None


def _kernels(z: Tensor) -> ModuleType | None:
    """The module with one pass over the logits in place of several, on a GPU with Triton; else None."""
    if not z.is_cuda or not can_launch(z.device):
        return None
    from .gpu import fused  # imported here: triton is optional, and slow to import

    return fused

"""Chunks of logits in plain torch: one buffer under the memory budget, written by BLAS and worked on in place.

Forward: row chunks [n, V], one matmul each, then `tiles.fold`. Backward: column panels [N, v], the matmul again, then
dz in place of z and two matmuls; a panel's weight gradient is written once, in the weight's dtype, without any sum.
Eager: the gradient is computed while a row chunk exists, three matmuls in all; weight gradients are summed over chunks.

A loss of log p_y alone has dz = a (p - r 1_y): the rows of p stay unscaled in the buffer, `a` scales the [N, D] side
matrices instead, and one entry per row is corrected. The loss itself costs no pass over [n, V] in torch. On a GPU, if
`gpu.matmuls` can, the matmul itself writes exponentials or dz; else `gpu.fused` reads the logits once for statistics
and once for the gradient, for every loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .algebra import Coefficients, coefficients, row_factor
from .buffers import Buffers, Gradients, longest
from .gpu.launch import can_launch
from .problem import Problem, Upstream, pieces
from .ranks import merge_ranks
from .statistics import wide
from .tail import Survey
from .tiles import add_columns, add_label_term_, concatenate, dlogits_, fold, has_kernels, softmax_

# The most chunks whose weight gradients are summed in the weight's dtype; each rounds the sum again. Measured on 2044
# real tokens of SmolLM2 in bfloat16, error of the weight gradient over that of dense torch: 1.04 for 4 chunks, 1.12 for
# 16, 1.20 for 32 (the rounding of the logits and of their gradient matters more). A GPU takes more, since its matmuls
# do not round the logits: 0.76 for 16 chunks of 8192 realistic tokens, Gemma 2's shape (benchmarks/results/h200).
MAX_LOW_PRECISION_SUMS, GPU_LOW_PRECISION_SUMS = 16, 32


def forward(problem: Problem) -> dict[str, Tensor]:
    """Every requested statistic, [N] each."""
    if matmuls := _matmuls(problem):
        parts = [_exponentials(matmuls, problem, rows, None).values for rows in problem.rows()]
        return concatenate(parts, problem)
    buffers = Buffers(problem, problem.rows())
    parts = [fold(problem, rows, buffers.load(rows), keep=False) for rows in problem.rows()]
    return concatenate(parts, problem)


def backward(
    problem: Problem, values: Mapping[str, Tensor], grads: Mapping[str, Tensor], share: Tensor | None = None
) -> dict[str, Tensor]:
    """Gradients of `sum(grads * statistics)` for every tensor in `problem.needs`.

    `problem` may cover some columns of a larger vocabulary, whose statistics are `values`; labels outside [0, V) then
    have no column here. The softmax mass of the columns is added to `share` [N], if any (plain coefficients only).
    """
    all_rows, panels = slice(0, len(problem.labels)), problem.columns()
    out = Gradients(problem, [all_rows], panels)
    coef, labels = coefficients(values, grads, problem.head.vocabulary), problem.label_columns
    if matmuls := _matmuls(problem):
        buffer = matmuls.rows_of(problem.hidden, longest(panels), len(labels))
        for cols in panels:
            dz = buffer[:, : cols.stop - cols.start]
            matmuls.dlogits(problem.hidden, problem.head[cols], labels - cols.start, values["lse"], coef, dz, share)
            out.push(all_rows, cols, dz)
        return out.finish()
    buffers = Buffers(problem, [all_rows], panels)
    for cols in panels:
        z, pay = buffers.load(all_rows, cols)
        if problem.column_weight is not None:
            coef = replace(coef, w=problem.column_weight[cols])
        dlogits_(problem, (z, pay), labels - cols.start, values["lse"], coef, share)
        factor = row_factor(coef, problem.head) if coef.plain and problem.head.softcap is None else None
        out.push(all_rows, cols, z, pay, coef, factor)
    return out.finish()


def eager(problem: Problem, upstream: Upstream, uses: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Statistics and gradients in one visit of each chunk.

    `uses` names the statistics that can have upstream gradients. To sum a low-precision weight gradient over many
    chunks would take a wide accumulator of twice its size: then there are two visits, `forward` and `backward`.
    """
    chunks, all_columns = problem.rows(), slice(0, problem.head.size)
    # a head in float32 has its weight gradient rounded once
    if len(chunks) > (1 if _narrow_gradient(problem) else most_chunks(problem)):
        values = merge_ranks(problem, forward(problem))
        return values, backward(problem, values, upstream(slice(0, len(problem.labels)), values))
    out, parts = Gradients(problem, chunks, [all_columns]), []
    plain, size = set(uses) <= {"lse", "target"}, problem.head.vocabulary
    if plain and (matmuls := _matmuls(problem)):
        buffer = matmuls.rows_of(problem.hidden, problem.head.size, longest(chunks))
        for rows in chunks:
            e = buffer[: rows.stop - rows.start]
            sums = _exponentials(matmuls, problem, rows, e)
            values = merge_ranks(problem, sums.values, rows)
            coef = coefficients(values, upstream(rows, values), size)
            if values is not sums.values:  # the sums are over this rank's columns
                coef = replace(coef, a=coef.a * (sums.values["lse"] - values["lse"]).exp())
            factor = matmuls.add_label_term_(e, problem.head, problem.label_columns[rows], coef, sums)
            out.push(rows, all_columns, e, factor=factor)
            parts.append(values)
        return concatenate(parts, problem), out.finish()
    buffers = Buffers(problem, chunks)
    plain = plain and problem.head.softcap is None
    softmax = plain and not has_kernels(buffers.z)  # a kernel computes p again as it reads
    for rows in chunks:
        z, pay = products = buffers.load(rows)
        local, total = (
            softmax_(problem, rows, products) if softmax else (fold(problem, rows, products, keep=True), None)
        )
        values = merge_ranks(problem, local, rows)
        coef = coefficients(values, upstream(rows, values), size)
        if total is not None:
            share = 1.0 if values is local else (local["lse"] - values["lse"]).exp()  # of this rank's columns
            coef = replace(coef, a=coef.a * share / total)
            add_label_term_(z, problem.label_columns[rows], coef)
        else:
            coef = replace(coef, w=problem.column_weight)
            dlogits_(problem, (z, pay), problem.label_columns[rows], values["lse"], coef)
        factor = row_factor(coef, problem.head) if plain else None
        out.push(rows, all_columns, z, pay, coef, factor)
        parts.append(values)
    return concatenate(parts, problem), out.finish()


def chunks_of(problem: Problem, tokens: int) -> list[slice]:
    """Chunks of tokens for one visit, of a problem with one row or more for each.

    Their rows fit the memory budget, unless there would be more chunks than weight gradients are summed over.
    """
    most = min(len(problem.rows()), most_chunks(problem))
    return pieces(tokens, math.ceil(tokens / most)) if tokens else []


def most_chunks(problem: Problem) -> float:
    """The most chunks whose weight gradients may be summed in their own dtype."""
    hidden = problem.hidden
    if wide(hidden.dtype) == hidden.dtype and not _narrow_gradient(problem):
        return math.inf
    return MAX_LOW_PRECISION_SUMS if hidden.device.type == "cpu" else GPU_LOW_PRECISION_SUMS


def _narrow_gradient(problem: Problem) -> bool:
    """Whether a gradient of the head has a narrower dtype than its products, as of a 16-bit head in float32."""
    tensors = problem.head.tensors
    return any(
        t is not None and name in problem.needs and t.dtype not in (wide(t.dtype), problem.hidden.dtype)
        for name, t in tensors.items()
        if name != "bias"
    )


def _exponentials(matmuls: ModuleType, problem: Problem, rows: slice, e: Tensor | None) -> Any:
    """`matmuls.exponentials` of one chunk."""
    columns = problem.readable_columns[rows]
    return matmuls.exponentials(problem.hidden[rows], problem.head, columns, problem.outputs, e)


def survey(problem: Problem, upstream: Upstream, groups: list[slice]) -> Survey:
    """Statistics, coefficients, and the sums over every column that `tail` needs, in one visit."""
    dtype, size = wide(problem.hidden.dtype), problem.head.size
    energy, mass = (problem.hidden.new_zeros(count, size, dtype=dtype) for count in (1, len(groups)))
    unit = problem.hidden.new_zeros((), dtype=dtype)
    parts, coefs = [], []
    for rows, local, z, lse, divisor in _softmax_rows(problem):
        values = merge_ranks(problem, local, rows)
        if values is not local:  # p is of the whole row, of which this rank has some columns
            shrunk = (values["lse"] - local["lse"]).exp()
            lse, divisor = (None, divisor * shrunk) if lse is None else (values["lse"], divisor)
        parts.append(values)
        coefs.append(coefficients(values, upstream(rows, values), problem.head.vocabulary))
        a = coefs[-1].a.abs()
        largest = torch.maximum(unit, a.amax())
        shrink = torch.where(largest > 0, unit / largest, 1.0)  # converts the sums so far to the new unit
        energy *= shrink**2
        mass *= shrink
        unit, a = largest, a / torch.where(largest > 0, largest, 1.0) / divisor
        for group, sums in zip(groups, mass, strict=True):
            overlap = slice(max(0, group.start - rows.start), max(0, min(len(z), group.stop - rows.start)))
            if overlap.start < overlap.stop:
                offset = None if lse is None else lse[overlap]
                add_columns(problem.head, z[overlap], offset, a[overlap], energy[0], sums)
    coef = Coefficients(a=torch.cat([c.a for c in coefs]), o=torch.cat([c.o for c in coefs]))
    return Survey(concatenate(parts, problem), coef, energy[0], mass)


def _softmax_rows(
    problem: Problem,
) -> Iterator[tuple[slice, dict[str, Tensor], Tensor, Tensor | None, Tensor | float]]:
    """Chunk by chunk: rows, statistics, z, lse and divisor, with p = e^(z - lse); without lse, p = z / divisor."""
    chunks = problem.rows()
    if matmuls := _matmuls(problem):
        buffer = matmuls.rows_of(problem.hidden, problem.head.size, longest(chunks))
        for rows in chunks:
            e = buffer[: rows.stop - rows.start]
            sums = _exponentials(matmuls, problem, rows, e)
            yield rows, sums.values, e, None, sums.total
        return
    buffers = Buffers(problem, chunks)
    softmax = not has_kernels(buffers.z)
    for rows in chunks:
        z, _ = buffers.load(rows)
        if softmax:
            values, total = softmax_(problem, rows, (z, None))
            yield rows, values, z, None, total
        else:
            values = fold(problem, rows, (z, None), keep=True)
            yield rows, values, z, values["lse"], 1.0


def _matmuls(problem: Problem) -> ModuleType | None:
    """The matmuls with the softmax in their epilogue, where the GPU and the problem allow them; else None.

    The answer is the same for a problem's statistics and for its gradients, which must be of the same logits: these
    matmuls do not round them, stored rows do.
    """
    kernels = _matmul_kernels(problem.hidden.device)
    return kernels if kernels and kernels.supports(problem) else None


def _matmul_kernels(device: torch.device) -> ModuleType | None:
    """The module of these matmuls on a GPU with Triton; else None."""
    if device.type != "cuda" or not can_launch(device):
        return None
    from .gpu import matmuls  # imported here: triton is optional, and slow to import

    return matmuls

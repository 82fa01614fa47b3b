"""Chunks of logits in plain torch: one buffer under the memory budget, written by BLAS and worked on in place.

Forward: row chunks [n, V], one matmul each, then `tiles.fold`. Backward: column panels [N, v], the matmul again, then
dz in place of z and two matmuls; a panel's weight gradient is written once, in the weight's dtype, without any sum.
Eager: the gradient is computed while a row chunk exists, three matmuls in all; weight gradients are summed over chunks.

A loss of log p_y alone has dz = a (p - r 1_y): the rows of p stay unscaled in the buffer, `a` scales the [N, D] side
matrices instead, and one entry per row is corrected. The loss itself costs no pass over [n, V] in torch; with kernels,
which compute p again as they read, the gradient is a pass of its own for every loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .algebra import Coefficients, coefficients, row_factor
from .head import Head
from .matmul import matmul_into, project
from .problem import TENSORS, Problem, Upstream
from .ranks import merge_ranks
from .statistics import wide
from .tail import Survey
from .tiles import add_columns, add_label_term_, add_rows, concatenate, dlogits_, fold, has_kernels

# The most chunks whose weight gradients are summed in the weight's dtype; each rounds the sum again. Measured on 2044
# real tokens of SmolLM2 in bfloat16, error of the weight gradient over that of dense torch: 1.04 for 4 chunks, 1.12 for
# 16, 1.20 for 32 (the rounding of the logits and of their gradient matters more).
MAX_LOW_PRECISION_SUMS = 16


def forward(problem: Problem) -> dict[str, Tensor]:
    """Every requested statistic, [N] each."""
    buffers = _Buffers(problem, problem.rows())
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
    buffers, out = _Buffers(problem, [all_rows], panels), _Gradients(problem, [all_rows], panels)
    coef, labels = coefficients(values, grads, problem.head.vocabulary), problem.label_columns
    for cols in panels:
        z, pay = buffers.load(all_rows, cols)
        dlogits_(problem, (z, pay), labels - cols.start, values["lse"], coef, share)
        out.push(all_rows, cols, z, pay, coef)
    return out.finish()


def eager(problem: Problem, upstream: Upstream, uses: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Statistics and gradients in one visit of each chunk.

    `uses` names the statistics that can have upstream gradients. To sum a low-precision weight gradient over many
    chunks would take a wide accumulator of twice its size: then there are two visits, `forward` and `backward`.
    """
    chunks, all_columns = problem.rows(), slice(0, problem.head.size)
    if wide(problem.hidden.dtype) != problem.hidden.dtype and len(chunks) > MAX_LOW_PRECISION_SUMS:
        values = merge_ranks(problem, forward(problem))
        return values, backward(problem, values, upstream(slice(0, len(problem.labels)), values))
    buffers, out, parts = _Buffers(problem, chunks), _Gradients(problem, chunks, [all_columns]), []
    plain = problem.head.softcap is None and set(uses) <= {"lse", "target"}
    softmax = plain and not has_kernels(buffers.z)  # a kernel computes p again as it reads
    for rows in chunks:
        z, pay = buffers.load(rows)
        local = fold(problem, rows, (z, pay), keep=True, softmax=softmax)
        values = merge_ranks(problem, local, rows)
        coef = coefficients(values, upstream(rows, values), problem.head.vocabulary)
        if softmax:
            if values is not local:  # the softmax in z is over this rank's columns
                coef = replace(coef, a=coef.a * (local["lse"] - values["lse"]).exp())
            add_label_term_(z, problem.label_columns[rows], coef)
        else:
            dlogits_(problem, (z, pay), problem.label_columns[rows], values["lse"], coef)
        out.push(rows, all_columns, z, pay, coef)
        parts.append(values)
    return concatenate(parts, problem), out.finish()


def survey(problem: Problem, upstream: Upstream, groups: list[slice]) -> Survey:
    """Statistics, coefficients, and the sums over every column that `tail` needs, in one visit."""
    buffers = _Buffers(problem, problem.rows())
    dtype, size = wide(problem.hidden.dtype), problem.head.size
    energy, mass = (problem.hidden.new_zeros(count, size, dtype=dtype) for count in (1, len(groups)))
    unit = problem.hidden.new_zeros((), dtype=dtype)
    parts, coefs, softmax = [], [], not has_kernels(buffers.z)
    for rows in problem.rows():
        z, _ = buffers.load(rows)
        parts.append(fold(problem, rows, (z, None), keep=True, softmax=softmax))
        coefs.append(coefficients(parts[-1], upstream(rows, parts[-1]), size))
        a = coefs[-1].a.abs()
        largest = torch.maximum(unit, a.amax())
        shrink = torch.where(largest > 0, unit / largest, 1.0)  # converts the sums so far to the new unit
        energy *= shrink**2
        mass *= shrink
        unit, a = largest, a / torch.where(largest > 0, largest, 1.0)
        for group, sums in zip(groups, mass, strict=True):
            overlap = slice(max(0, group.start - rows.start), max(0, min(len(z), group.stop - rows.start)))
            if overlap.start < overlap.stop:
                lse = parts[-1]["lse"][overlap]
                add_columns(problem.head, z[overlap], lse, a[overlap], energy[0], sums)
    coef = Coefficients(a=torch.cat([c.a for c in coefs]), o=torch.cat([c.o for c in coefs]))
    return Survey(concatenate(parts, problem), coef, energy[0], mass)


class _Buffers:
    """Preallocated memory for the logits of one tile, and for those of the payload."""

    def __init__(self, problem: Problem, rows: list[slice], cols: list[slice] | None = None):
        self.problem = problem
        cols = cols or [slice(0, problem.head.size)]
        size = max((r.stop - r.start for r in rows), default=0) * max(c.stop - c.start for c in cols)
        self.z = problem.hidden.new_empty(size)
        self.pay = None if problem.payload is None else problem.payload[0].new_empty(size)

    def load(self, rows: slice, cols: slice | None = None) -> tuple[Tensor, Tensor | None]:
        """The raw products (before scale and softcap) of a tile; they overwrite those of the previous tile."""
        problem, cols = self.problem, cols or slice(0, self.problem.head.size)
        shape = (rows.stop - rows.start, cols.stop - cols.start)
        count = shape[0] * shape[1]
        z = project(problem.hidden[rows], problem.head[cols], self.z[:count].view(shape))
        if problem.payload is None or self.pay is None:
            return z, None
        return z, project(problem.payload[0][rows], problem.payload[1][cols], self.pay[:count].view(shape))


class _Gradients:
    """The gradients, accumulated over tiles: the first tile of a row or column writes, the others add.

    Rows of the hidden gradient are summed over column panels, in a wide dtype if there are several; columns of the
    weight gradient are summed over row chunks, in the weight's dtype.
    """

    def __init__(self, problem: Problem, rows: list[slice], cols: list[slice]):
        self.problem = problem
        self.last_panel = cols[-1]
        self.tensors = {name: t for name, t in zip(TENSORS, problem.tensors, strict=True) if t is not None}
        self.sums = {name: self._new_sum(name, not rows, len(cols) > 1) for name in problem.needs}

    def _new_sum(self, name: str, empty: bool, several: bool) -> Tensor:
        """A tensor for one sum; `empty` if there are no rows, `several` if there is more than one column panel."""
        tensor = self.tensors[name]
        keep = "weight" in name or name == "adapter" or ("hidden" in name and not several)
        dtype = tensor.dtype if keep else wide(tensor.dtype)
        # those of the payload are not written if no upstream gradient reaches it
        allocate = torch.zeros_like if empty or "payload" in name or "bias" in name else torch.empty_like
        return allocate(tensor, dtype=dtype, memory_format=torch.contiguous_format)

    def push(self, rows: slice, cols: slice, dz: Tensor, dpay: Tensor | None, coef: Coefficients) -> None:
        """Apply the chain rule of the head to one tile. For plain coefficients `dz` lacks the row factor a * scale."""
        head, factor = self.problem.head, None
        if coef.plain and head.softcap is None:
            factor = row_factor(coef, head)
        self._add_head("", rows, cols, dz, factor, self.problem.hidden, head)
        if dpay is not None and self.problem.payload is not None and coef.d is not None:
            self._add_head("payload_", rows, cols, dpay, None, *self.problem.payload)

    def _add_head(
        self, prefix: str, rows: slice, cols: slice, dz: Tensor, factor: Tensor | None, hidden: Tensor, head: Head
    ) -> None:
        """The same for one of the heads, whose tensors have names with `prefix`; `factor` [n, 1], if any, scales dz."""
        for name, (matrix, features) in head.matrices.items():
            if prefix + "hidden" in self.sums:
                dh = self.sums[prefix + "hidden"][rows, features]
                matmul_into(dh, dz, matrix[cols], first=cols.start == 0)
                if factor is not None and cols == self.last_panel:
                    dh.mul_(factor)
            if prefix + name in self.sums:
                side = hidden[rows, features]
                side = side if factor is None else (side * factor).to(hidden.dtype)
                matmul_into(self.sums[prefix + name][cols], dz.T, side, first=rows.start == 0)
        if prefix + "bias" in self.sums:
            db = self.sums[prefix + "bias"][cols]
            ones = torch.ones_like(dz[:, :1], dtype=db.dtype) if factor is None else factor
            add_rows(db, dz, ones.squeeze(-1))

    def finish(self) -> dict[str, Tensor]:
        """The sums, each in the dtype of the tensor that it is the gradient of."""
        return {name: total.to(self.tensors[name].dtype) for name, total in self.sums.items()}

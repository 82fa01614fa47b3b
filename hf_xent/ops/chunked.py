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

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .algebra import Coefficients, coefficients, row_factor
from .gpu.launch import can_launch
from .head import Head
from .matmul import matmul_into, project
from .problem import TENSORS, Problem, Upstream
from .ranks import merge_ranks
from .statistics import wide
from .tail import Survey
from .tiles import add_columns, add_label_term_, add_rows, concatenate, dlogits_, fold, has_kernels, softmax_

# The most chunks whose weight gradients are summed in the weight's dtype; each rounds the sum again. Measured on 2044
# real tokens of SmolLM2 in bfloat16, error of the weight gradient over that of dense torch: 1.04 for 4 chunks, 1.12 for
# 16, 1.20 for 32 (the rounding of the logits and of their gradient matters more). A GPU takes more, since its matmuls
# do not round the logits: 0.76 for 16 chunks of 8192 realistic tokens, Gemma 2's shape (benchmarks/results/h200).
MAX_LOW_PRECISION_SUMS, GPU_LOW_PRECISION_SUMS = 16, 32
# Rows of logits whose length is a multiple of LOADED numbers are aligned for the widest loads of a GPU, and so are they
# for its matmuls; others, such as the 50257 of GPT-2, are padded to a multiple of PADDED, a line of its cache.
LOADED, PADDED = 16, 64


def forward(problem: Problem) -> dict[str, Tensor]:
    """Every requested statistic, [N] each."""
    if matmuls := _matmuls(problem):
        parts = [_exponentials(matmuls, problem, rows, None).values for rows in problem.rows()]
        return concatenate(parts, problem)
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
    out = _Gradients(problem, [all_rows], panels)
    coef, labels = coefficients(values, grads, problem.head.vocabulary), problem.label_columns
    if matmuls := _matmuls(problem):
        buffer = matmuls.rows_of(problem.hidden, _longest(panels), len(labels))
        for cols in panels:
            dz = buffer[:, : cols.stop - cols.start]
            matmuls.dlogits(problem.hidden, problem.head[cols], labels - cols.start, values["lse"], coef, dz, share)
            out.push(all_rows, cols, dz, None, coef, None)
        return out.finish()
    buffers = _Buffers(problem, [all_rows], panels)
    for cols in panels:
        z, pay = buffers.load(all_rows, cols)
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
    most = MAX_LOW_PRECISION_SUMS if problem.hidden.device.type == "cpu" else GPU_LOW_PRECISION_SUMS
    sums = len(chunks) * (2 if "payload_weight" in problem.tied else 1)
    if wide(problem.hidden.dtype) != problem.hidden.dtype and sums > most:
        values = merge_ranks(problem, forward(problem))
        return values, backward(problem, values, upstream(slice(0, len(problem.labels)), values))
    out, parts = _Gradients(problem, chunks, [all_columns]), []
    plain, size = set(uses) <= {"lse", "target"}, problem.head.vocabulary
    if plain and (matmuls := _matmuls(problem)):
        buffer = matmuls.rows_of(problem.hidden, problem.head.size, _longest(chunks))
        for rows in chunks:
            e = buffer[: rows.stop - rows.start]
            sums = _exponentials(matmuls, problem, rows, e)
            values = merge_ranks(problem, sums.values, rows)
            coef = coefficients(values, upstream(rows, values), size)
            if values is not sums.values:  # the sums are over this rank's columns
                coef = replace(coef, a=coef.a * (sums.values["lse"] - values["lse"]).exp())
            factor = matmuls.add_label_term_(e, problem.head, problem.label_columns[rows], coef, sums)
            out.push(rows, all_columns, e, None, coef, factor)
            parts.append(values)
        return concatenate(parts, problem), out.finish()
    buffers = _Buffers(problem, chunks)
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
            dlogits_(problem, (z, pay), problem.label_columns[rows], values["lse"], coef)
        factor = row_factor(coef, problem.head) if plain else None
        out.push(rows, all_columns, z, pay, coef, factor)
        parts.append(values)
    return concatenate(parts, problem), out.finish()


def _exponentials(matmuls: ModuleType, problem: Problem, rows: slice, e: Tensor | None) -> Any:
    """`matmuls.exponentials` of one chunk."""
    columns = problem.readable_columns[rows]
    return matmuls.exponentials(problem.hidden[rows], problem.head, columns, problem.outputs, e)


def _longest(slices: list[slice]) -> int:
    return max((s.stop - s.start for s in slices), default=0)


def survey(problem: Problem, upstream: Upstream, groups: list[slice]) -> Survey:
    """Statistics, coefficients, and the sums over every column that `tail` needs, in one visit."""
    dtype, size = wide(problem.hidden.dtype), problem.head.size
    energy, mass = (problem.hidden.new_zeros(count, size, dtype=dtype) for count in (1, len(groups)))
    unit = problem.hidden.new_zeros((), dtype=dtype)
    parts, coefs = [], []
    for rows, values, z, lse, divisor in _softmax_rows(problem):
        parts.append(values)
        coefs.append(coefficients(values, upstream(rows, values), size))
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
        buffer = matmuls.rows_of(problem.hidden, problem.head.size, _longest(chunks))
        for rows in chunks:
            e = buffer[: rows.stop - rows.start]
            sums = _exponentials(matmuls, problem, rows, e)
            yield rows, sums.values, e, None, sums.total
        return
    buffers = _Buffers(problem, chunks)
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


class _Buffers:
    """Preallocated memory for the logits of one tile, and for those of the payload."""

    def __init__(self, problem: Problem, rows: list[slice], cols: list[slice] | None = None):
        self.problem = problem
        cols = cols or [slice(0, problem.head.size)]
        self.stride = self._stride(_longest(cols))
        size = _longest(rows) * self.stride
        self.z = problem.hidden.new_empty(size)
        self.pay = None if problem.payload is None else problem.payload[0].new_empty(size)

    def load(self, rows: slice, cols: slice | None = None) -> tuple[Tensor, Tensor | None]:
        """The raw products (before scale and softcap) of a tile; they overwrite those of the previous tile."""
        problem, cols = self.problem, cols or slice(0, self.problem.head.size)
        z = project(problem.hidden[rows], problem.head[cols], self._tile(self.z, rows, cols))
        if problem.payload is None or self.pay is None:
            return z, None
        return z, project(problem.payload[0][rows], problem.payload[1][cols], self._tile(self.pay, rows, cols))

    def _tile(self, memory: Tensor, rows: slice, cols: slice) -> Tensor:
        """The beginning of the memory in the shape of a tile."""
        count, width = rows.stop - rows.start, cols.stop - cols.start
        stride = width if memory.device.type == "cpu" else self.stride
        return memory[: count * stride].view(count, stride)[:, :width]

    def _stride(self, width: int) -> int:
        """From one row of a tile to the next: rows of a GPU begin where its widest loads and stores can."""
        loose = self.problem.hidden.device.type == "cpu" or width % LOADED == 0
        return width if loose else -(-width // PADDED) * PADDED


class _Gradients:
    """The gradients, accumulated over tiles: the first tile of a row or column writes, the others add.

    Rows of the hidden gradient are summed over column panels, in a wide dtype if there are several; columns of the
    weight gradient are summed over row chunks, in the weight's dtype. What the payload's head has in common with the
    head has one sum, under the name of the head's.
    """

    def __init__(self, problem: Problem, rows: list[slice], cols: list[slice]):
        self.problem = problem
        self.last_panel = cols[-1]
        self.tensors = {name: t for name, t in zip(TENSORS, problem.tensors, strict=True) if t is not None}
        self.tied = problem.tied
        names = [name for name in problem.needs if name not in self.tied]
        self.sums = {name: self._new_sum(name, not rows, len(cols) > 1) for name in names}

    def _new_sum(self, name: str, empty: bool, several: bool) -> Tensor:
        """A tensor for one sum; `empty` if there are no rows, `several` if there is more than one column panel."""
        tensor = self.tensors[name]
        keep = "weight" in name or name == "adapter" or ("hidden" in name and not several)
        dtype = tensor.dtype if keep else wide(tensor.dtype)
        # those of the payload are not written if no upstream gradient reaches it
        allocate = torch.zeros_like if empty or "payload" in name or "bias" in name else torch.empty_like
        return allocate(tensor, dtype=dtype, memory_format=torch.contiguous_format)

    def push(
        self, rows: slice, cols: slice, dz: Tensor, dpay: Tensor | None, coef: Coefficients, factor: Tensor | None
    ) -> None:
        """Apply the chain rule of the head to one tile; `factor` [n, 1], if any, is left out of the rows of `dz`."""
        self._add_head("", rows, cols, dz, factor, self.problem.hidden, self.problem.head)
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
            own = self.tied.get(prefix + name, prefix + name)
            if own in self.sums:
                side = hidden[rows, features]
                side = side if factor is None else torch.mul(side, factor, out=torch.empty_like(side))
                first = rows.start == 0 and own == prefix + name  # the head, which comes first, has written a tied sum
                matmul_into(self.sums[own][cols], dz.T, side, first=first)
        own = self.tied.get(prefix + "bias", prefix + "bias")
        if own in self.sums:
            db = self.sums[own][cols]
            ones = torch.ones_like(dz[:, :1], dtype=db.dtype) if factor is None else factor
            add_rows(db, dz, ones.squeeze(-1))

    def finish(self) -> dict[str, Tensor]:
        """The sums, each in the dtype of the tensor that it is the gradient of."""
        return {name: total.to(self.tensors[name].dtype) for name, total in self.sums.items()}

"""The memory of a visit: the products of one tile at a time, and the gradients that are summed over tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from .algebra import Coefficients
from .head import Head
from .matmul import add_hidden_gradient, add_matrix_gradient, add_scaled_gradient, project
from .panels import Scaled, panels
from .problem import TENSORS, Problem
from .statistics import wide
from .tiles import add_rows

# Rows of logits whose length is a multiple of LOADED numbers are aligned for the widest loads of a GPU, and so are they
# for its matmuls; others, such as the 50257 of GPT-2, are padded to a multiple of PADDED, a line of its cache.
LOADED, PADDED = 16, 64


def longest(slices: list[slice]) -> int:
    """The length of the longest slice, or 0."""
    return max((s.stop - s.start for s in slices), default=0)


class Buffers:
    """Preallocated memory for the logits of one tile, and for those of the payload."""

    def __init__(self, problem: Problem, rows: list[slice], cols: list[slice] | None = None):
        self.problem = problem
        cols = cols or [slice(0, problem.head.size)]
        self.stride = self._stride(longest(cols))
        size = longest(rows) * self.stride
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


class Gradients:
    """The gradients, accumulated over tiles: the first tile of a row or column writes, the others add.

    Rows of the hidden gradient are summed over column panels, in a wide dtype if there are several; columns of the
    weight gradient are summed over row chunks, in the weight's dtype.
    """

    def __init__(self, problem: Problem, rows: list[slice], cols: list[slice]):
        self.problem = problem
        self.last_panel = cols[-1]
        self.tensors = {name: t for name, t in zip(TENSORS, problem.tensors, strict=True) if t is not None}
        # a hidden gradient is also summed over the panels in which a head is converted
        heads = {"hidden": problem.head} | ({} if problem.payload is None else {"payload_hidden": problem.payload[1]})
        dtypes = {name: self.tensors[name].dtype for name in heads}
        several = {
            name: len(cols) > 1 or any(len(panels(m, dtypes[name])) > 1 for m, _ in head.matrices.values())
            for name, head in heads.items()
        }
        self.sums = {name: self._new_sum(name, not rows, several.get(name, False)) for name in problem.needs}

    def _new_sum(self, name: str, empty: bool, several: bool) -> Tensor:
        """A tensor for one sum; `empty` if there are no rows, `several` if there is more than one column panel."""
        tensor = self.tensors[name]
        keep = "weight" in name or name == "adapter" or ("hidden" in name and not several)
        dtype = tensor.dtype if keep else wide(tensor.dtype)
        # those of the payload are not written if no upstream gradient reaches it
        zeros = empty or "payload" in name or name.endswith(("bias", "gain"))
        allocate = torch.zeros_like if zeros else torch.empty_like
        return allocate(tensor, dtype=dtype, memory_format=torch.contiguous_format)

    def push(
        self,
        rows: slice,
        cols: slice,
        dz: Tensor,
        dpay: Tensor | None = None,
        coef: Coefficients | None = None,
        factor: Tensor | None = None,
    ) -> None:
        """Apply the chain rule of the head to one tile; `factor` [n, 1], if any, is left out of the rows of `dz`."""
        self._add_head("", rows, cols, dz, factor, self.problem.hidden, self.problem.head)
        if dpay is not None and self.problem.payload is not None and coef is not None and coef.d is not None:
            self._add_head("payload_", rows, cols, dpay, None, *self.problem.payload)

    def _add_head(
        self, prefix: str, rows: slice, cols: slice, dz: Tensor, factor: Tensor | None, hidden: Tensor, head: Head
    ) -> None:
        """The same for one of the heads, whose tensors have names with `prefix`; `factor` [n, 1], if any, scales dz."""
        for name, (matrix, features) in head.matrices.items():
            if prefix + "hidden" in self.sums:
                dh = self.sums[prefix + "hidden"][rows, features]
                add_hidden_gradient(dh, dz, matrix[cols], first=cols.start == 0)
                if factor is not None and cols == self.last_panel:
                    dh.mul_(factor)
            total = self.sums.get(prefix + name)
            gain = self.sums.get(prefix + "gain") if isinstance(matrix, Scaled) else None
            if total is None and gain is None:
                continue
            side, first = hidden[rows, features], rows.start == 0
            side = side if factor is None else torch.mul(side, factor, out=torch.empty_like(side))
            if isinstance(matrix, Scaled):
                weight_sum, gain_sum = (None if x is None else x[cols] for x in (total, gain))
                add_scaled_gradient(weight_sum, gain_sum, dz, side, matrix[cols], first=first)
            elif total is not None:
                add_matrix_gradient(total[cols], dz, side, first=first)
        if prefix + "bias" in self.sums:
            db = self.sums[prefix + "bias"][cols]
            ones = torch.ones_like(dz[:, :1], dtype=db.dtype) if factor is None else factor
            add_rows(db, dz, ones.squeeze(-1))

    def finish(self) -> dict[str, Tensor]:
        """The sums, each in the dtype of the tensor that it is the gradient of."""
        return {name: total.to(self.tensors[name].dtype) for name, total in self.sums.items()}

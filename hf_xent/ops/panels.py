"""A matrix that is not multiplied as it is stored: a panel of its rows at a time is turned into numbers to multiply.

So there is never a whole copy of it. There are three kinds: a 16-bit tensor whose products are to be in float32, a
matrix whose rows have factors (`Scaled`), and `Panels` of a quantized matrix, which have no gradient.

Shapes: V rows of the matrix, the vocabulary; D columns, hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .statistics import wide

# Bytes of a panel as it is multiplied: large enough for fast products, and small beside logits and gradients.
PANEL_BYTES, GPU_PANEL_BYTES = 8 << 20, 64 << 20


class Stored(Protocol):
    """A matrix [V, D] in a form of its own, such as 4-bit codes with scales."""

    @property
    def shape(self) -> torch.Size:
        """[V, D]."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows that it makes."""
        ...

    @property
    def device(self) -> torch.device:
        """The device on which they are made."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Its rows from `start` on, [stop - start, D], without a graph; 0 <= start < stop <= V."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that it is stored in, by which a change is noticed."""
        ...


@dataclass(frozen=True, eq=False)
class Panels:
    """Consecutive rows of a stored matrix, in a dtype: what `Head.weight` is if it is not a tensor.

    It answers to the names that a constant tensor of this shape has.

    Args:
        stored: The whole matrix.
        dtype: The dtype of the rows that it gives.
        start: The first row.
        stop: The row after the last.
    """

    stored: Stored
    dtype: torch.dtype
    start: int
    stop: int

    requires_grad = False
    ndim = 2

    @classmethod
    def of(cls, stored: Stored) -> Panels:
        """All rows of a stored matrix, in its own dtype."""
        return cls(stored, stored.dtype, 0, stored.shape[0])

    @property
    def shape(self) -> torch.Size:
        """[rows, D]."""
        return torch.Size((len(self), self.stored.shape[1]))

    @property
    def device(self) -> torch.device:
        """The device on which its rows are made."""
        return self.stored.device

    def __len__(self) -> int:
        return self.stop - self.start

    def element_size(self) -> int:
        """Bytes of a number of its rows."""
        return self.dtype.itemsize

    def detach(self) -> Panels:
        """Itself, since it has no gradient."""
        return self

    def to(self, dtype: torch.dtype) -> Panels:
        """The same rows in another dtype."""
        return replace(self, dtype=dtype)

    def rows(self, part: slice) -> Tensor:
        """Some of its rows as a tensor [n, D]."""
        view = self[part]
        if not len(view):
            return torch.empty(view.shape, dtype=self.dtype, device=self.device)
        return self.stored.rows(view.start, view.stop).to(self.dtype)

    def __getitem__(self, tokens: Any) -> Any:
        """A slice: these rows, not made yet. Ids [...]: their rows as a tensor [..., D]."""
        if isinstance(tokens, slice):
            start, stop, step = tokens.indices(len(self))
            if step != 1:
                raise ValueError(f"the slice has step {step}: a head that is read by panels needs consecutive rows")
            return replace(self, start=self.start + start, stop=self.start + max(start, stop))
        ids = tokens.reshape(-1) % len(self)  # as negative ids count from the end
        out = torch.empty(len(ids), self.shape[1], dtype=self.dtype, device=self.device)
        for part, rows in converted(self, self.dtype):
            here = ((ids >= part.start) & (ids < part.stop)).nonzero().squeeze(-1)
            out[here] = rows[ids[here] - part.start]
        return out.reshape(*tokens.shape, -1)


@dataclass(frozen=True, eq=False)
class UnitRows:
    """The rows of panels, divided by their length; zeros stay zeros. Itself a stored matrix."""

    base: Panels

    @property
    def shape(self) -> torch.Size:
        """[V, D]."""
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """The device on which its rows are made."""
        return self.base.device

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows of length 1, normalized in the dtype of statistics."""
        rows = self.base.rows(slice(start, stop))
        return F.normalize(rows.to(wide(rows.dtype)), dim=-1)

    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the matrix below."""
        return self.base.stored.tensors()


Matrix = Tensor | Panels


@dataclass(frozen=True, eq=False)
class Scaled:
    """A matrix whose rows are multiplied by one factor each: gain_j W_j."""

    matrix: Matrix  # [V, D]
    gain: Tensor  # [V]

    @property
    def shape(self) -> torch.Size:
        """[V, D]."""
        return self.matrix.shape

    @property
    def device(self) -> torch.device:
        """The device of the matrix."""
        return self.matrix.device

    def __len__(self) -> int:
        return len(self.matrix)

    def __getitem__(self, part: slice) -> Scaled:
        return Scaled(self.matrix[part], self.gain[part])


def is_converted(matrix: Matrix | Scaled, dtype: torch.dtype) -> bool:
    """Whether a matrix has to be converted, panel by panel, to be multiplied in a dtype."""
    return not isinstance(matrix, Tensor) or matrix.dtype != dtype


def panels(matrix: Matrix | Scaled, dtype: torch.dtype) -> list[slice]:
    """The rows of each panel; one has all rows if nothing is converted."""
    size, width = matrix.shape
    if not is_converted(matrix, dtype):
        return [slice(0, size)]
    budget = PANEL_BYTES if matrix.device.type == "cpu" else GPU_PANEL_BYTES
    step = max(16, budget // (width * dtype.itemsize) // 16 * 16)
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]


def converted(matrix: Matrix | Scaled, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Panel by panel: its rows, and their numbers in a dtype."""
    for part in panels(matrix, dtype):
        yield part, _in(matrix[part], dtype)


def _in(panel: Matrix | Scaled, dtype: torch.dtype) -> Tensor:
    """The numbers of a panel in a dtype."""
    if isinstance(panel, Scaled):
        gain = panel.gain[:, None]
        wider = torch.promote_types(gain.dtype, dtype)  # so that the product is rounded once
        return (_in(panel.matrix, wider) * gain).to(dtype)
    return (panel if isinstance(panel, Tensor) else panel.rows(slice(None))).to(dtype)


def linear(hidden: Tensor, matrix: Matrix, bias: Tensor | None = None) -> Tensor:
    """`F.linear(hidden, matrix, bias)` in the dtype of hidden, differentiable; the graph keeps no converted panel."""
    spans = panels(matrix, hidden.dtype)
    if isinstance(matrix, Tensor):  # one node of the graph, which concatenates gradients instead of adding them up
        parts: list[Any] = list(matrix.split([span.stop - span.start for span in spans]))
    else:
        parts = [matrix[span] for span in spans]
    again = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
    with torch.autocast(hidden.device.type, enabled=False):
        products = [
            checkpoint(_product, hidden, part, use_reentrant=False, preserve_rng_state=False)
            if again
            else _product(hidden, part)
            for part in parts
        ]
        raw = torch.cat(products, -1) if len(products) > 1 else products[0]
        return raw if bias is None else raw + bias.to(raw.dtype)


def _product(hidden: Tensor, panel: Matrix) -> Tensor:
    return F.linear(hidden, _in(panel, hidden.dtype))

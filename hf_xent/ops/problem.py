"""The input of a backend: a `Problem`, and the chunks of rows or columns in which it visits the logits.

A backend is a module with `forward(problem)`, which computes statistics, and `backward(problem, values, grads)`, which
computes gradients. Some have `eager(problem, upstream, uses)`, which does both in one visit of the logits, and
`survey(problem, upstream, groups)`, for the sparse tail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .head import Head, Payload

ALIGNMENT = 16  # of rows or columns: matmul kernels work on multiples of it
TILE = (
    128  # rows or columns of a tile in the matmul kernels of accelerators; what exceeds whole tiles costs a tile more
)
# The most columns of a panel on a CPU: of 1024 tokens, wider ones take memory and no less time
COLUMNS = 8192
TENSORS = ("hidden", "weight", "bias", "adapter", "gain", "payload_hidden", "payload_weight", "payload_bias")
Upstream = Callable[[slice, dict[str, Tensor]], dict[str, Tensor]]
"""(rows, their statistics) -> the upstream gradients of these by name; a backend calls it once per chunk, in order."""


@dataclass(frozen=True, eq=False)
class Problem:
    """The input of a backend: valid tokens only, checked, on one device and in one dtype."""

    hidden: Tensor  # [N, D]
    head: Head
    labels: Tensor  # [N], of the whole vocabulary
    outputs: frozenset[str]  # statistics to compute, with those that their gradients need
    payload: Payload | None = None  # ([N, D2], head of the same V)
    memory_budget: int = 24 << 20  # bytes of logits in memory at a time
    tail: float = 0.0  # relative error allowed in the gradient of the logits, whose tail is compressed; 0 is exact
    needs: frozenset[str] = frozenset()  # which of TENSORS need a gradient
    mean_weight: Tensor | None = None  # [V], of the whole vocabulary: the statistic `mean` is (1/V) sum_j w_j z_j

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Every tensor that a gradient can flow to, in the order of TENSORS."""
        first = (self.hidden, *self.head.tensors.values())
        if self.payload is None:
            return (*first, None, None, None)
        second = self.payload[1].tensors
        return (*first, self.payload[0], second["weight"], second["bias"])

    def with_tensors(self, tensors: tuple[Any, ...], labels: Any) -> Problem:
        """The same problem over other tensors, in the order of TENSORS."""
        hidden, *of_head, payload_hidden, payload_weight, payload_bias = tensors
        head = self.head.with_tensors(*of_head)
        payload = self.payload
        if payload is not None:
            payload = (payload_hidden, payload[1].with_tensors(payload_weight, payload_bias, None, None))
        return replace(self, hidden=hidden, head=head, labels=labels, payload=payload)

    def without_tensors(self) -> Problem:
        """The same problem without its tensors, for a graph to keep; `with_tensors` puts the saved ones back."""
        return self.with_tensors((None,) * len(TENSORS), None)

    @property
    def label_columns(self) -> Tensor:
        """Labels as columns of the head [N]; outside [0, V) if another rank has them."""
        return self.labels if self.head.shard is None else self.labels - self.head.shard.start

    @property
    def readable_columns(self) -> Tensor:
        """The same within [0, V), for kernels that read the label's logit; `merge_ranks` drops those of other ranks."""
        return self.labels if self.head.shard is None else self.label_columns.clamp(0, self.head.size - 1)

    @property
    def column_weight(self) -> Tensor | None:
        """The factors of this rank's logits in the statistic `mean`, [V]; None if each is 1."""
        shard = self.head.shard
        if self.mean_weight is None or shard is None:
            return self.mean_weight
        return self.mean_weight[shard.start : shard.start + self.head.size]

    def rows(self) -> list[slice]:
        """Row chunks whose logits (and payload) over the whole head fit the memory budget; the same on all ranks."""
        shard = self.head.shard
        most = self._fitting(self.head.size if shard is None else shard.width)
        return pieces(len(self.labels), most, self._tile)

    def columns(self) -> list[slice]:
        """Column panels whose logits (and payload) for all tokens fit the memory budget; few columns on a CPU."""
        most = self._fitting(len(self.labels))
        return pieces(self.head.size, most if self._tile else min(most, COLUMNS), self._tile)

    @property
    def _tile(self) -> int:
        """What the length of chunks and panels should be a multiple of, or 0 on a CPU, which has no such tiles."""
        return 0 if self.hidden.device.type == "cpu" else TILE

    def _fitting(self, length: int) -> int:
        """How many rows or columns of `length` logits fit the memory budget."""
        bytes_each = length * self.hidden.element_size() * (1 if self.payload is None else 2)
        return max(1, self.memory_budget // max(1, bytes_each))


def pieces(count: int, most: int, tile: int = 0) -> list[slice]:
    """The range 0..count in as few slices of at most `most` as possible.

    They are about equally long, since a short one would run slowly, and multiples of ALIGNMENT if that fits. If `most`
    holds a `tile`, whole tiles come first: all slices but the last are multiples of it, also where that takes more.
    """
    step = -(-count // max(1, -(-count // most))) or 1
    if tile and step < count and tile <= most:
        step = min(-(-step // tile), most // tile) * tile
    else:
        aligned = -(-step // ALIGNMENT) * ALIGNMENT
        step = aligned if aligned <= most else step
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]

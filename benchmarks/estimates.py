"""What bytes and products alone imply: the time and the memory of a loss with both gradients, by its algorithm.

Every stage takes the longer of its arithmetic and its memory traffic; a matmul that adds to the weight gradient also
takes a part of the shorter one. Times are seconds, sizes bytes, logits and matrices bfloat16 (two bytes each).
Shapes: N tokens, V vocabulary, D hidden; n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from hf_xent.ops import Head
from hf_xent.ops.chunked import GPU_LOW_PRECISION_SUMS
from hf_xent.ops.problem import TILE, Problem, pieces
from hf_xent.ops.request import Request

LAUNCH = 4e-6  # assumed: seconds of a kernel that has next to nothing to do
HIDDEN_SHARE = 0.5  # assumed: how much of the traffic of a weight gradient's sum its arithmetic hides
EPILOGUE = 0.10  # assumed: how much longer the logits' matmul takes with the softmax in its epilogue
COLUMNS = 256  # of a tile in `hf_xent.ops.gpu.matmuls`, which leaves two sums for each of its rows
SIDE = 128  # of the square tiles of cut-cross-entropy's kernels


@dataclass(frozen=True)
class Device:
    """What a GPU sustains."""

    name: str
    products: float  # bfloat16 operations of large matmuls per second
    memory: float  # bytes per second
    cache: float  # bytes per second from the second-level cache


@dataclass(frozen=True)
class Shape:
    """One input, and its name in the files of measurements."""

    name: str
    N: int
    V: int
    D: int

    @property
    def logits(self) -> int:
        """Bytes of all logits: what one pass over them reads."""
        return 2 * self.N * self.V

    @property
    def weight(self) -> int:
        """Bytes of the head, and of its gradient."""
        return 2 * self.V * self.D


class Estimate(NamedTuple):
    """Of one design on one device: seconds, bytes beyond inputs and gradients, and how the tokens are cut."""

    seconds: float
    memory: float
    heights: list[int]  # rows of each chunk; none where logits are not stored
    visits: int = 1


@dataclass(frozen=True)
class Design:
    """How stored chunks of logits are worked on; a pass reads or writes every stored logit once."""

    plan: Callable[[Shape, int | None], tuple[list[int], list[int]]]
    passes: int  # over a chunk that is visited once
    first_passes: int  # where there are two visits: over the row chunks of the first,
    second_passes: int  # and over the column panels of the second
    epilogue: bool  # whether the softmax is in the epilogue of the logits' matmul
    launches: int  # of small kernels a chunk
    scaling: bool  # whether the finished weight gradient is multiplied by a number
    most_chunks: int  # in one visit


# Stages


def product(device: Device, m: int, n: int, k: int) -> float:
    """An [m, k] by [k, n] matmul whose result is written."""
    return max(2 * m * n * k / device.products, 2 * (m * k + k * n + m * n) / device.memory)


def logits(device: Device, shape: Shape, rows: int, columns: int, epilogue: bool) -> float:
    """The matmul of a tile of logits; the project's own kernel pads rows to whole tiles."""
    padded = -(-rows // TILE) * TILE if epilogue else rows
    return product(device, padded, columns, shape.D) * (1 + EPILOGUE if epilogue else 1)


def passes(device: Device, stored: int, count: float) -> float:
    """`count` reads or writes of so many stored logits."""
    return 2 * stored * count / device.memory


def hidden_gradient(device: Device, shape: Shape, rows: int, columns: int) -> float:
    """Its matmul, which BLAS is assumed to split over the vocabulary where the result has few tiles."""
    return product(device, rows, shape.D, columns)


def weight_traffic(shape: Shape, chunks: int, itemsize: int = 2) -> int:
    """Bytes of the sum over chunks: all of them write it, all but the first read it."""
    return shape.V * shape.D * itemsize * (2 * chunks - 1)


def weight_gradient(device: Device, shape: Shape, rows: int, first: bool, itemsize: int = 2) -> float:
    """The matmul that adds one chunk to the weight gradient."""
    arithmetic = 2 * rows * shape.V * shape.D / device.products
    traffic = shape.V * shape.D * itemsize * (1 if first else 2) / device.memory
    return max(arithmetic, traffic) + (1 - HIDDEN_SHARE) * min(arithmetic, traffic)


def hidden_sums(device: Device, shape: Shape, panels: int) -> float:
    """Adding each panel's [N, D] product, written in two bytes, to a sum in four."""
    return panels * shape.N * shape.D * (2 + 2 + 4 + 4) / device.memory


def scaling(device: Device, shape: Shape) -> float:
    """Reading and writing the weight gradient once more."""
    return 2 * shape.weight / device.memory


# The project's designs


def today(shape: Shape, rows: int | None) -> tuple[list[int], list[int]]:
    """Heights of row chunks and widths of column panels, from the code itself; `rows` sets the memory budget."""
    hidden, weight, labels = (
        torch.empty(*size, dtype=dtype, device="meta")
        for size, dtype in (
            ((shape.N, shape.D), torch.bfloat16),
            ((shape.V, shape.D), torch.bfloat16),
            ((shape.N,), torch.int64),
        )
    )
    head = Head(weight)
    budget = Request(memory_budget=None if rows is None else 2 * rows * shape.V).budget(head, shape.N, 2)
    problem = Problem(hidden, head, labels, frozenset({"lse", "target"}), memory_budget=budget)
    return _lengths(problem.rows()), _lengths(problem.columns())


def before(shape: Shape, rows: int | None) -> tuple[list[int], list[int]]:
    """The same of commit 9cec539: 256 MiB or half a byte per number in the head, no whole tiles."""
    budget = max(256 << 20, shape.V * shape.D // 2) if rows is None else 2 * rows * shape.V
    return _lengths(pieces(shape.N, budget // (2 * shape.V))), _lengths(pieces(shape.V, budget // (2 * shape.N)))


def _lengths(slices: list[slice]) -> list[int]:
    return [s.stop - s.start for s in slices]


# Stored rows, now: statistics read, the gradient reads and writes. Before: the softmax read twice and wrote, rows
# without a gradient were silenced by a read and a write; after a first visit the softmax took a read and a write.
EPILOGUES = Design(today, 0, 0, 0, True, 8, False, GPU_LOW_PRECISION_SUMS)
STORED = Design(today, 3, 1, 2, False, 8, False, GPU_LOW_PRECISION_SUMS)
BEFORE = Design(before, 5, 1, 4, False, 39, True, 16)


def streamed(design: Design, device: Device, shape: Shape, rows: int | None = None) -> Estimate:
    """A design of this project; `rows` in place of its default height of a chunk."""
    heights, panels = design.plan(shape, rows)
    once = len(heights) <= design.most_chunks
    time = sum(logits(device, shape, n, shape.V, design.epilogue) for n in heights)
    time += design.launches * LAUNCH * len(heights)
    time += scaling(device, shape) if design.scaling else 0
    sums = 8 * -(-shape.V // COLUMNS) if design.epilogue else 0
    memory = heights[0] * (2 * shape.V + 2 * shape.D + sums)  # logits, scaled hidden states, sums of tiles
    if once:
        time += passes(device, shape.N * shape.V, design.passes)
        time += sum(hidden_gradient(device, shape, n, shape.V) for n in heights)
        time += sum(weight_gradient(device, shape, n, first=i == 0) for i, n in enumerate(heights))
        return Estimate(time, memory, heights)
    time += passes(device, shape.N * shape.V, design.first_passes + design.second_passes)
    for columns in panels:
        time += logits(device, shape, shape.N, columns, design.epilogue)
        time += hidden_gradient(device, shape, shape.N, columns) + product(device, columns, shape.D, shape.N)
    time += hidden_sums(device, shape, len(panels)) + design.launches * LAUNCH * len(panels)
    memory = shape.N * (2 * max(panels) + (4 + 2) * shape.D)  # logits, the wide sum and one panel's product
    return Estimate(time, memory, heights, visits=2)


# Others


def matmuls(device: Device, shape: Shape) -> Estimate:
    """The three products alone, each in one call, with the logits in memory."""
    one = product(device, shape.N, shape.V, shape.D)
    return Estimate(3 * one, shape.logits, [])


def dense(device: Device, shape: Shape) -> Estimate:
    """F.cross_entropy of bfloat16 logits: about ten passes, three tensors of the size of the logits."""
    time = matmuls(device, shape).seconds + passes(device, shape.N * shape.V, 10)
    return Estimate(time, 3 * shape.logits, [shape.N])


def liger(device: Device, shape: Shape) -> Estimate:
    """Liger 0.8.5: as many chunks as V holds D, of a power of two; three passes, sums in the weight's dtype."""
    rows = -(-shape.N // -(-shape.V // shape.D))
    heights = _every(shape.N, 1 << (rows - 1).bit_length())
    return _row_chunks(device, shape, heights, count=3, itemsize=2, epilogue=False)


def quack(device: Device, shape: Shape) -> Estimate:
    """Quack: chunks of 4096, exponentials from the epilogue, a weight gradient in four bytes that is then converted."""
    heights = _every(shape.N, 4096)
    found = _row_chunks(device, shape, heights, count=0, itemsize=4, epilogue=True)
    converted = shape.V * shape.D * (4 + 2) / device.memory
    return Estimate(found.seconds + converted, found.memory + shape.weight, heights)


def _every(count: int, step: int) -> list[int]:
    """The heights of chunks of `step` rows."""
    return [min(step, count - start) for start in range(0, count, step)]


def _row_chunks(
    device: Device, shape: Shape, heights: list[int], *, count: int, itemsize: int, epilogue: bool
) -> Estimate:
    """One visit of chunks of rows, with `count` passes and a weight gradient of `itemsize` bytes a number."""
    time = passes(device, shape.N * shape.V, count) + EPILOGUES.launches * LAUNCH * len(heights)
    for i, n in enumerate(heights):
        time += product(device, n, shape.V, shape.D) * (1 + EPILOGUE if epilogue else 1)
        time += hidden_gradient(device, shape, n, shape.V) + weight_gradient(device, shape, n, i == 0, itemsize)
    return Estimate(time, 2 * heights[0] * shape.V, heights)


def cut(device: Device, shape: Shape, share: float) -> Estimate:
    """Cut-cross-entropy: logits twice in square tiles from the cache; then a `share` of the tiles has gradients.

    Of such a tile both gradients are matmuls that read one operand each, and read and write a sum each, under locks.
    """
    tiles = -(-shape.N // SIDE) * -(-shape.V // SIDE)
    strip = SIDE * shape.D * 2  # bytes of one operand of a tile
    arithmetic = 2 * shape.N * shape.V * shape.D / device.products
    one = max(arithmetic, tiles * 2 * strip / device.cache)
    both = max(2 * arithmetic, tiles * (2 + 4) * strip / device.cache)
    return Estimate(2 * one + share * both, 8 * shape.N, [])


DESIGNS: dict[str, Callable[[Device, Shape], Estimate]] = {
    "three matmuls": matmuls,
    "hf_xent": partial(streamed, EPILOGUES),
    "hf_xent, stored rows": partial(streamed, STORED),
    "hf_xent of 9cec539, stored rows": partial(streamed, BEFORE),
    "dense": dense,
    "Liger": liger,
    "cut-cross-entropy, no tile has gradients": partial(cut, share=0.0),
    "cut-cross-entropy, all tiles have them": partial(cut, share=1.0),
    "quack": quack,
}

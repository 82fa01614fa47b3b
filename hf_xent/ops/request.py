"""The options of one call, in one object that the public functions hand down to the backend."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from numbers import Real
from types import ModuleType
from typing import Any

from . import chunked, reference
from .head import Head
from .problem import TILE

# Bytes. The taller the chunks the faster (benchmarks/results/h200), but all beyond the gradients is to fit 400 MB.
GPU_BUDGET = 395_000_000
IMPLS = ("reference", "chunked", "triton")


@dataclass(frozen=True)
class Request:
    """The options of a call beside hidden states, head and labels; public functions take them as keywords."""

    observe: tuple[str, ...] = ()
    """Statistics to compute in addition to those that the loss needs; they carry no gradient."""
    ignore_index: int = -100
    """The label of positions to ignore."""
    impl: str | None = None
    """'reference', 'chunked' or 'triton'; None is the environment's HF_XENT_IMPL, else 'chunked'."""
    memory_budget: int | None = None
    """Bytes of logits in memory at a time; None is `default_budget`."""
    tail: float = 0.0
    """Relative error allowed in the gradient of the logits (`hf_xent.ops.tail`); 0 is exact."""
    unreduced: bool = False
    """Whether to return the losses in the shape of labels instead of their sum."""

    @property
    def impl_name(self) -> str:
        """The name of the backend."""
        return self.impl or os.environ.get("HF_XENT_IMPL") or "chunked"

    def backend(self) -> ModuleType:
        """The module that streams the vocabulary. Raises: ValueError for an unknown `impl`."""
        name = self.impl_name
        if name not in IMPLS:
            raise ValueError(f"impl is {name!r}: choose one of {', '.join(IMPLS)} (argument impl, or HF_XENT_IMPL)")
        if name == "triton":
            from .gpu import streaming  # imported here: triton is optional

            return streaming
        return {"reference": reference, "chunked": chunked}[name]

    def budget(self, head: Head, tokens: int, itemsize: int) -> int:
        """The bytes of logits in memory at a time, which by default depend on what `default_budget` takes.

        Raises: ValueError if `memory_budget` is not a positive number.
        """
        budget: Any = self.memory_budget
        if budget is None:
            return default_budget(head, tokens, itemsize)
        number = float(budget) if isinstance(budget, Real) else math.nan
        if not 0 < number < math.inf:
            raise ValueError(f"memory_budget is {budget!r}: pass a positive number of bytes")
        return max(1, int(number))


def default_budget(head: Head, tokens: int, itemsize: int) -> int:
    """Bytes of logits in memory at a time: half a byte per number in the head, so that they are small beside it.

    That is an eighth of a float32 head and gives D / 8 rows per chunk; a 16-bit head gets twice the rows, which its
    matmuls need. On a CPU at least 24 MiB, and at least 256 float32 rows or 512 of 16 bits, of which matmuls are fast.

    Elsewhere GPU_BUDGET, unless that would cut the tokens into more chunks than weight gradients are summed over in
    their own dtype: then as much as so many chunks take, in whole tiles of rows.

    Args:
        head: The head; of one that is split over ranks, the widest part counts, so that all ranks agree.
        tokens: How many rows of logits there are.
        itemsize: Bytes per token and entry of the vocabulary: of a logit, and of the payload's if there is one.
    """
    size = head.size if head.shard is None else head.shard.width
    if head.weight.device.type == "cpu":
        return max(24 << 20, size * max(1024, head.weight.shape[1] // 2))
    rows = -(-tokens // chunked.GPU_LOW_PRECISION_SUMS)
    tiled = min(tokens, -(-rows // TILE) * TILE)
    return max(tiled * size * itemsize, GPU_BUDGET)

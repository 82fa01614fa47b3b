"""What is asked of a call beside its operands: one object from the public doors down to the backend."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from numbers import Real
from types import ModuleType
from typing import Any

from . import chunked, reference
from .head import Head

IMPLS = ("reference", "chunked", "triton")


@dataclass(frozen=True)
class Request:
    """What is asked of a call beside hidden states, head and labels; public functions take its fields as keywords."""

    observe: tuple[str, ...] = ()
    """Statistics wanted beside those that the call needs by itself; they carry no gradient."""
    ignore_index: int = -100
    """The label that means 'no label'."""
    impl: str | None = None
    """'reference', 'chunked' or 'triton'; None is the environment's HF_XENT_IMPL, else 'chunked'."""
    memory_budget: int | None = None
    """Bytes of logits alive at a time; None is `default_budget` of the head."""
    tail: float = 0.0
    """Relative error allowed to the gradient of the logits (`hf_xent.ops.tail`); 0 is exact."""
    unreduced: bool = False
    """Whether losses are wanted in the shape of labels rather than their sum."""

    def backend(self) -> ModuleType:
        """The module that streams the vocabulary. Raises: ValueError for an unknown `impl`."""
        name = self.impl or os.environ.get("HF_XENT_IMPL") or "chunked"
        if name not in IMPLS:
            raise ValueError(f"impl is {name!r}: choose one of {', '.join(IMPLS)} (argument impl, or HF_XENT_IMPL)")
        if name == "triton":
            from .gpu import streaming  # imported here: triton is optional

            return streaming
        return {"reference": reference, "chunked": chunked}[name]

    def budget(self, head: Head) -> int:
        """The bytes of logits alive at a time. Raises: ValueError for what is no positive number."""
        budget: Any = self.memory_budget
        if budget is None:
            return default_budget(head)
        number = float(budget) if isinstance(budget, Real) else math.nan
        if not 0 < number < math.inf:
            raise ValueError(f"memory_budget is {budget!r}: pass a positive number of bytes")
        return max(1, int(number))


def default_budget(head: Head) -> int:
    """Bytes of logits alive at a time: half a byte a number in the head, so that they do not stand out beside it.

    That is an eighth of a float32 head and makes D / 8 rows a chunk; a 16-bit one gets twice the rows, as its matmuls
    want. At least 24 MiB on a CPU (128 float32 rows of a 49k vocabulary: below that matmuls slow down), 256 MiB
    elsewhere (not yet measured there).
    """
    rows = head.size if head.shard is None else head.shard.width  # the same on all ranks
    return max((24 if head.weight.device.type == "cpu" else 256) << 20, rows * head.weight.shape[1] // 2)

"""Gradients of losses of two models that are known as formulas, strip by strip of a chunk of products, in place.

Without autograd a strip is read and written about twenty times while it is in the cache, a tenth of the time of the
matmuls, and few tensors like it exist. A strip has at least one row for each thread, since torch divides a softmax's
work by rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .head import Head
from .problem import Problem
from .statistics import wide

# Bytes of a strip on a CPU, of which five fit its cache together; on accelerators strips only bound scratch memory.
STRIP_BYTES, GPU_STRIP_BYTES = 1 << 20, 32 << 20
DEPTH = 1e4  # how far below the largest logit a banned token's is, finite: times its probability of 0 it adds nothing

Closed = Callable[[Tensor, Tensor, Tensor, "Memory"], tuple[dict[str, Tensor], Tensor]]
"""(labels [n], the student's logits [n, V], the teacher's) -> values, and the gradient of 'loss' by the student's.

Values are [n] each by name. The logits may be written over, and so the gradient may be in the place of the student's.
"""


class Memory:
    """Scratch memory for strips, each part of it under a name; it is allocated once."""

    def __init__(self) -> None:
        self.parts: dict[str, Tensor] = {}

    def like(self, x: Tensor, name: str) -> Tensor:
        """A tensor in the shape of x [n, V] and in the dtype of statistics; what it holds is undefined."""
        part = self.parts.get(name)
        if part is None or part.numel() < x.numel():
            part = self.parts[name] = torch.empty(x.numel(), dtype=wide(x.dtype), device=x.device)
        return part[: x.numel()].view(x.shape)


def softmax_(z: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Softmaxes of logits z [n, V] in p, which may be z; log sum e^z [n], and the sum [n] of p, which is nearly 1.

    torch's softmax sums a long row in order: over 262144 columns its normalizer errs by 2.5e-5, these sums by 2e-6.
    """
    largest = z.amax(-1)
    total = torch.softmax(z, -1, out=p).sum(-1)
    return largest + (total / p.amax(-1)).log(), total


def log_softmax_(z: Tensor, p: Tensor) -> Tensor:
    """Logits z [n, V] -> log-probabilities in place, their exponentials in p, and the normalizers [n]."""
    lse, total = softmax_(z, p)
    p.mul_(total.reciprocal()[:, None])  # several times faster than a division by rows
    z.sub_(lse[:, None])
    return lse


def differentiate_(
    closed: Closed, problem: Problem, labels: Tensor, products: tuple[Tensor, Tensor], weight: Tensor
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """The values of a chunk, strip by strip, whose products [n, V] of the first model become the weighted gradient.

    Args:
        closed: The formula.
        problem: The first model's head, and the second's as its payload.
        labels: Columns of the labels [n].
        products: The raw products of both models [n, V].
        weight: The factors of the losses [n].
    """
    assert problem.payload is not None
    memory, head, (first, second) = Memory(), problem.head, products
    for span in _spans(first):
        z, slope = _activated(head, first[span], memory, "first")
        other, _ = _activated(problem.payload[1], second[span], memory, "second")
        values, gradient = closed(labels[span], z, other, memory)
        if problem.needs:
            gradient.mul_(weight[span, None] if isinstance(slope, Tensor) else (weight[span] * slope)[:, None])
            if isinstance(slope, Tensor):
                gradient.mul_(slope)
            if gradient.data_ptr() != first[span].data_ptr():
                first[span] = gradient
        yield span, values


def _activated(head: Head, raw: Tensor, memory: Memory, name: str) -> tuple[Tensor, Tensor | float]:
    """The logits of raw products in the dtype of statistics, which may be those in place, and their derivative."""
    if raw.dtype != wide(raw.dtype):
        raw = memory.like(raw, name).copy_(raw)
    z = head.activate(raw)
    if head.bias is not None:  # which alone may ban tokens
        torch.maximum(z, z.amax(-1, keepdim=True) - DEPTH, out=z)
    return z, head.slope(z)


def _spans(products: Tensor) -> Iterator[slice]:
    """The rows of each strip."""
    on_cpu = products.device.type == "cpu"
    least = torch.get_num_threads() if on_cpu else 1
    budget = STRIP_BYTES if on_cpu else GPU_STRIP_BYTES
    step = max(least, budget // (products.shape[1] * 4))
    return (slice(i, i + step) for i in range(0, len(products), step))

"""The calls that launch every kernel of `hf_xent.ops.gpu` in every variant: names, and functions without arguments.

Their tensors are on the CPU and hold zeros: they are for a driver that compiles and launches nothing (`offline`).
A variant is *plain* if cross-entropy of 16-bit numbers in aligned rows launches it, or a common option of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import torch
from torch import Tensor

from hf_xent.ops import DIFFERENTIABLE, STATISTICS, Head
from hf_xent.ops.algebra import Coefficients
from hf_xent.ops.gpu import fused, matmuls, scaling, streaming
from hf_xent.ops.problem import TENSORS, Problem
from hf_xent.ops.shard import Shard
from hf_xent.ops.statistics import wide

ROWS, SIZE, FEATURES = 300, 16384, 256  # more tiles than a GPU has multiprocessors
ODD_SIZE, ODD_FEATURES = 16381, 250
PLAIN, SURE = frozenset({"lse", "target"}), frozenset({"lse", "target", "entropy", "top"})
BOTH = frozenset({"hidden", "weight"})
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
Variants = Iterator[tuple[str, Callable[[], object]]]


def of(selection: str, *, descriptors: bool) -> Variants:
    """The variants of a selection: the `plain` ones in bfloat16, or `all` in every dtype.

    Args:
        selection: "plain" or "all".
        descriptors: Whether the GPU has the copy engine that `matmuls` loads and stores by.
    """
    parts = []
    if selection == "all":
        parts = [(name, part(dtype)) for name, dtype in DTYPES.items() for part in (plain, others)]
    else:
        parts = [("bf16", plain(torch.bfloat16))]
    if descriptors:
        parts += [("bf16", plain_matmuls())] + ([("bf16", other_matmuls())] if selection == "all" else [])
    return chain.from_iterable(((f"{dtype} {name}", call) for name, call in part) for dtype, part in parts)


def plain(dtype: torch.dtype) -> Variants:
    """Kernels of every dtype, as cross-entropy without bias and softcap launches them."""
    whole = problem(dtype)
    one = torch.ones(ROWS, dtype=wide(dtype))
    yield "streaming forward", lambda: streaming.forward(whole)
    yield "streaming backward", lambda: backward(whole)
    yield "streaming survey", lambda: survey(whole)
    yield "stored statistics", lambda: statistics(whole)
    yield "stored gradients", lambda: stored_gradients(whole)
    yield "stored column sums", lambda: column_sums(whole, stored(dtype), one)
    yield "scaling", lambda: scaling.scale_unless_one_(stored(dtype), torch.ones(1))


def others(dtype: torch.dtype) -> Variants:
    """Kernels of every dtype with options, with statistics beyond those of cross-entropy, and over odd sizes."""
    whole = problem(dtype)
    odd = problem(dtype, size=ODD_SIZE, features=ODD_FEATURES)
    capped = problem(dtype, bias=True, softcap=30.0, needs=frozenset(TENSORS[:3]))
    everything = replace(capped, outputs=frozenset(STATISTICS), needs=frozenset(TENSORS))
    everything = replace(everything, payload=(whole.hidden, capped.head))
    turned = replace(whole, head=Head(whole.head.weight.T.contiguous().T))
    one = torch.ones(ROWS, dtype=wide(dtype))
    yield "streaming forward, entropy and top", lambda: streaming.forward(replace(whole, outputs=SURE))
    yield "streaming forward, bias and softcap", lambda: streaming.forward(capped)
    yield "streaming forward, all statistics", lambda: streaming.forward(everything)
    yield "streaming forward, odd sizes", lambda: streaming.forward(odd)
    yield "streaming forward, a shard", lambda: streaming.forward(sharded(whole))
    yield "streaming backward, bias and softcap", lambda: backward(capped)
    yield "streaming backward, all gradients", lambda: backward(everything, DIFFERENTIABLE)
    yield "streaming backward, frozen weight", lambda: backward(replace(whole, needs=frozenset({"hidden"})))
    yield "streaming backward, frozen hidden", lambda: backward(replace(whole, needs=frozenset({"weight"})))
    yield "streaming backward, share of the columns", lambda: backward(whole, share=one)
    yield "streaming backward, odd sizes", lambda: backward(odd)
    yield "streaming backward, transposed weight", lambda: backward(turned)
    yield "streaming survey, bias and softcap", lambda: survey(capped)
    yield "stored statistics, entropy and top", lambda: statistics(replace(whole, outputs=SURE))
    yield "stored statistics, all", lambda: statistics(everything)
    yield "stored statistics, odd sizes", lambda: statistics(odd)
    yield "stored gradients, share of the columns", lambda: stored_gradients(whole, share=one)
    yield "stored gradients, softcap", lambda: stored_gradients(capped)
    yield "stored gradients, all", lambda: stored_gradients(everything, Coefficients(*6 * [one]))
    yield "stored gradients, odd sizes", lambda: stored_gradients(odd)
    yield "stored column sums, softcap, odd sizes", lambda: column_sums(capped, stored(dtype, ODD_SIZE), one)
    yield "stored rows, sum", lambda: fused.add_rows(torch.zeros(SIZE, dtype=wide(dtype)), stored(dtype), one)


def plain_matmuls() -> Variants:
    """The matmuls with an epilogue, as cross-entropy and its entropy launch them, with and without a softcap."""
    whole, capped = problem(torch.bfloat16), problem(torch.bfloat16, softcap=30.0)
    one = torch.ones(ROWS)
    yield "matmul exponentials", lambda: exponentials(whole)
    yield "matmul exponentials, entropy and top", lambda: exponentials(replace(whole, outputs=SURE))
    yield "matmul exponentials, softcap", lambda: exponentials(capped)
    yield "matmul label term", lambda: label_term(whole)
    yield "matmul gradients", lambda: matmul_gradients(whole, Coefficients(a=one, o=one))


def other_matmuls() -> Variants:
    """The same with a bias, over odd sizes, and with more coefficients."""
    capped = problem(torch.bfloat16, bias=True, softcap=30.0)
    odd = problem(torch.bfloat16, size=ODD_SIZE)
    odd_capped = replace(capped, head=capped.head[:ODD_SIZE], outputs=SURE)
    one = torch.ones(ROWS)
    yield "matmul exponentials, not stored", lambda: exponentials(odd, store=False)
    yield "matmul exponentials, odd sizes", lambda: exponentials(odd)
    yield "matmul exponentials, bias and softcap", lambda: exponentials(capped)
    yield "matmul exponentials, all, odd sizes", lambda: exponentials(odd_capped)
    yield "matmul label term, bias and softcap", lambda: label_term(capped)
    many = Coefficients(a=one, o=one, b=one, c=one, s=one)
    yield "matmul gradients, share of the columns", lambda: matmul_gradients(odd, Coefficients(one, one), share=one)
    yield "matmul gradients, share and softcap", lambda: matmul_gradients(capped, Coefficients(one, one), share=one)
    yield "matmul gradients, all coefficients", lambda: matmul_gradients(odd, many)
    yield "matmul gradients, bias and softcap", lambda: matmul_gradients(capped, many)


def problem(
    dtype: torch.dtype,
    *,
    size: int = SIZE,
    features: int = FEATURES,
    bias: bool = False,
    softcap: float | None = None,
    needs: frozenset[str] = BOTH,
) -> Problem:
    """A problem of zeros for cross-entropy."""
    head = Head(zeros(dtype, size, features), zeros(dtype, size) if bias else None, 0.7 if softcap else 1.0, softcap)
    return Problem(zeros(dtype, ROWS, features), head, torch.zeros(ROWS, dtype=torch.int64), PLAIN, needs=needs)


def sharded(whole: Problem) -> Problem:
    """The same with a head that is the first half of a vocabulary."""
    group = SimpleNamespace(size=lambda: 2)
    return replace(whole, head=replace(whole.head, shard=Shard(group, 0, 2 * whole.head.size)), outputs=SURE)


def backward(whole: Problem, names: tuple[str, ...] = ("lse", "target"), share: Tensor | None = None) -> None:
    """The streaming backward from gradients of some statistics."""
    one = torch.ones(ROWS, dtype=wide(whole.hidden.dtype))
    streaming.backward(whole, dict.fromkeys(STATISTICS, one), dict.fromkeys(names, one), share)


def survey(whole: Problem) -> None:
    """The sums over columns that the sparse tail needs."""
    one = torch.ones(ROWS, dtype=wide(whole.hidden.dtype))
    streaming.survey(whole, lambda rows, values: {"lse": one, "target": -one}, [slice(0, 160), slice(160, ROWS)])


def statistics(whole: Problem) -> None:
    """The statistics of stored rows."""
    z, pay = (stored(whole.hidden.dtype, whole.head.size) for _ in range(2))
    fused.statistics(whole, z, pay, whole.labels)


def stored_gradients(whole: Problem, coef: Coefficients | None = None, share: Tensor | None = None) -> None:
    """The gradients of stored rows, in their place."""
    z, pay = (stored(whole.hidden.dtype, whole.head.size) for _ in range(2))
    one = torch.ones(ROWS, dtype=wide(z.dtype))
    fused.dlogits_(whole, (z, pay), whole.labels, one, coef or Coefficients(one, one), share)


def column_sums(whole: Problem, z: Tensor, one: Tensor) -> None:
    """The sums over tokens of stored rows."""
    energy, mass = (torch.zeros(z.shape[1], dtype=one.dtype) for _ in range(2))
    fused.column_sums(whole.head, z, one, one, energy, mass)


def exponentials(whole: Problem, *, store: bool = True) -> matmuls.Exponentials:
    """The matmul with the softmax in its epilogue."""
    e = matmuls.rows_of(whole.hidden, whole.head.size, ROWS) if store else None
    return matmuls.exponentials(whole.hidden, whole.head, whole.labels, whole.outputs, e)


def label_term(whole: Problem) -> None:
    """The correction of one entry per row."""
    one = torch.ones(ROWS)
    sums = matmuls.Exponentials({}, one, one, one)
    e = matmuls.rows_of(whole.hidden, whole.head.size, ROWS)
    matmuls.add_label_term_(e, whole.head, whole.labels, Coefficients(a=one, o=one), sums)


def matmul_gradients(whole: Problem, coef: Coefficients, share: Tensor | None = None) -> None:
    """The matmul with the gradient in its epilogue."""
    dz = matmuls.rows_of(whole.hidden, whole.head.size, ROWS)
    matmuls.dlogits(whole.hidden, whole.head, whole.labels, torch.ones(ROWS), coef, dz, share)


def stored(dtype: torch.dtype, size: int = SIZE) -> Tensor:
    """Rows of raw products."""
    return zeros(dtype, ROWS, size)


def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
    """Zeros of a dtype."""
    return torch.zeros(*shape, dtype=dtype)

"""What `tiles` does to stored logits strip by strip in torch, in one pass each on a GPU; the kernels: `row_kernels`.

    statistics    raw products -> any statistics                                1 read
    dlogits_      raw products -> their gradient, in place                      1 read, 1 write
    column_sums   raw products and lse -> sums over tokens, for the sparse tail 1 read
    add_rows      gradients -> their sum over tokens, for a bias                1 read

Shapes: z [n, V] of any stride between rows, and so the payload's products. Numerics: as in `statistics`; z keeps its
dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..algebra import Coefficients, State, finish
from ..head import Head
from ..problem import Problem
from ..statistics import wide
from . import row_kernels
from .streaming import DTYPES, INTERPRETED, STATE_OF

# How far the maximum may be from the label's logit, nats, before a row is read again. Sums of e^u stay in float32's
# range up to 60, those of e^2u up to 30; moments of u lose digits with its power.
REACH = {"log_sum_sq": 30.0, "entropy": 16.0, "variance": 4.0}
FARTHEST = 60.0


class Block(NamedTuple):
    """How much a program works on at a time, and how it is compiled: `stages` tiles are in memory, or on their way."""

    bytes: int  # of logits
    warps: int
    stages: int


# Chosen among those tried on an H200 (benchmarks/results/h200), over 512 rows of 256000 bfloat16 logits: no other was
# faster for all losses.
LIGHT, HEAVY = Block(8192, 8, 3), Block(4096, 8, 4)  # statistics: few sums per lane; many or a payload (not tuned)
GRADIENTS = Block(4096, 8, 4)
SUMS, SUM_ROWS = Block(256, 4, 3), 32  # of one row; rows of a tile
INTERPRETER_COLUMNS, INTERPRETER_ROWS = 64, 4  # small, so that tests of a few rows visit several tiles


def statistics(problem: Problem, z: Tensor, pay: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
    """The problem's statistics of rows of raw products; `labels` [n] are columns of z."""
    n, dtype = len(z), wide(z.dtype)
    wanted = {"m", "l"}.union(*(STATE_OF.get(name, ()) for name in problem.outputs))
    floats = {name: z.new_empty(n, dtype=dtype) for name in sorted(wanted)}
    integers = {name: labels.new_empty(n) for name in ("top", "rank") if name in problem.outputs}
    state, target = State(**floats, **integers), z.new_empty(n, dtype=dtype)
    heavy = len(floats) + len(integers) > 5 or "sp" in wanted
    reach = min((REACH[name] for name in REACH if name in problem.outputs), default=FARTHEST)
    moments = {name.upper(): getattr(state, name) for name in ("m", "l", "s1", "s2", "sp", "sq", "sz", "top", "rank")}
    operands = _operands(problem, z, pay if "sp" in wanted else None)
    operands |= {"Y": labels.contiguous(), "TARGET": target, "REACH": reach, **moments}
    _launch(row_kernels._row_statistics, n, operands, HEAVY if heavy else LIGHT)
    values = finish(state, target, z.shape[1])
    return {name: values[name] for name in problem.outputs}


def dlogits_(
    problem: Problem,
    products: tuple[Tensor, Tensor | None],
    labels: Tensor,
    lse: Tensor,
    coef: Coefficients,
    share: Tensor | None = None,
) -> None:
    """`tiles.dlogits_`, which says what the arguments are; a payload without gradient is left as it is."""
    z, pay = products
    numbers = {"GA": coef.a, "GB": coef.b, "GC": coef.c, "GD": coef.d, "GS": coef.s, "GO": coef.o}
    pay = None if coef.d is None else pay
    operands = _operands(problem, z, pay) | {
        "Y": labels.contiguous(),
        "LSE": lse.contiguous(),
        "SHARE": share,
        "FACTORED": coef.plain and problem.head.softcap is None,
        "BOTH": any(name.startswith("payload") for name in problem.needs),
        **{name: None if number is None else number.contiguous() for name, number in numbers.items()},
    }
    _launch(row_kernels._row_gradients, len(z), operands, GRADIENTS)


def column_sums(head: Head, z: Tensor, lse: Tensor | None, a: Tensor, energy: Tensor, mass: Tensor) -> None:
    """energy [V] += sum_t (a_t p_tj)^2 and mass [V] += sum_t a_t p_tj, of raw products z, or of p without `lse`."""
    _sum_columns(head, z, lse, a, energy, mass)


def add_rows(total: Tensor, rows: Tensor, weights: Tensor) -> None:
    """total [V] += sum_t weights_t rows_tj, in the dtype of total."""
    _sum_columns(None, rows, None, weights, None, total)


def _sum_columns(
    head: Head | None, z: Tensor, lse: Tensor | None, a: Tensor, energy: Tensor | None, mass: Tensor
) -> None:
    """Launch the kernel over columns; without a head z is summed as it is."""
    columns = INTERPRETER_COLUMNS if INTERPRETED else SUMS.bytes // z.element_size()
    operands = {
        "Z": z,
        "LSE": None if lse is None else lse.contiguous(),
        "GA": a.contiguous(),
        "ENERGY": energy,
        "MASS": mass,
        "n": len(z),
        "V": z.shape[1],
        "stride": z.stride(0),
        "scale": 1.0 if head is None else float(head.scale),
        "CAP": None if head is None else head.softcap,
        "ACC": DTYPES[wide(z.dtype)],
        "BT": INTERPRETER_ROWS if INTERPRETED else SUM_ROWS,
    }
    _launch(row_kernels._column_sums, triton.cdiv(z.shape[1], columns), operands, SUMS)


def _operands(problem: Problem, z: Tensor, pay: Tensor | None) -> dict[str, Any]:
    """The operands that both kernels over rows take, by parameter name."""
    second = None if pay is None or problem.payload is None else problem.payload[1]
    return {
        "Z": z,
        "PAY": pay,
        "V": z.shape[1],
        "stride": z.stride(0),
        "stride2": 0 if pay is None else pay.stride(0),
        "scale": float(problem.head.scale),
        "scale2": 1.0 if second is None else float(second.scale),
        "CAP": problem.head.softcap,
        "CAP2": None if second is None else second.softcap,
        "ACC": DTYPES[wide(z.dtype)],
    }


def _launch(kernel: Any, programs: int, operands: dict[str, Any], block: Block) -> None:
    """Run a kernel on the operands it takes, with fused multiply-add, for which Triton's default varies."""
    z = operands["Z"]
    columns = INTERPRETER_COLUMNS if INTERPRETED else block.bytes // z.element_size()
    operands |= {"BV": columns, "STAGES": block.stages}
    if programs and len(z):
        with torch.cuda.device_of(z):  # Triton launches on the current device
            arguments = {name: operands[name] for name in kernel.arg_names}
            kernel[(programs,)](**arguments, num_warps=block.warps, enable_fp_fusion=True)

"""Triton backend: the vocabulary streamed through registers; memory is O(N + parameters), never a row of logits.

Forward: every program folds BT rows over one split of the vocabulary; the splits' states [splits, N] are folded by
`algebra.merge`. Backward: every tile of logits is computed again, turned into dz, and multiplied into float32 sums of
the gradients at once (atomics, so the order of the sum is not fixed). Kernels and formulas: `kernels`.

Shapes: N tokens, V vocabulary, D hidden, D2 hidden of the second head. Numerics: as in `statistics`; matmuls of
float32 inputs are IEEE float32, not TF32.
Source: tiles that live in registers only, as in Wijmans et al. 2024, Cut Your Losses, arXiv:2411.09009, sec. 4.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra import Coefficients, State, coefficients, finish, merge
from ..head import Payload
from ..problem import TENSORS, Problem, Upstream
from ..ranks import merge_ranks
from ..statistics import wide
from ..tail import Survey

try:
    import triton
    import triton.language as tl

    from . import kernels
except ImportError as error:
    raise ImportError(
        "impl is 'triton' but triton cannot be imported: pip install triton, or choose impl='chunked'"
    ) from error

INTERPRETED = not isinstance(kernels._stats_fwd, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 at import


class Blocks(NamedTuple):
    """How a kernel is tiled and compiled: a tile of logits is [rows, columns], its matmul takes steps of `depth`."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By bytes of an element: the largest blocks that spill no registers on sm_90 (they also compile for sm_75 to sm_120).
BLOCKS = {2: Blocks(128, 128, 64, 8, 3), 4: Blocks(64, 64, 16, 8, 2), 8: Blocks(32, 32, 16, 4, 2)}
# The forward holds no gradient and has registers for more columns, so that it reads the hidden states less often. With
# more than these statistics, a bias, or rows that cannot be loaded 16 numbers at a time, it would spill some.
FORWARD_BLOCKS = BLOCKS | {2: Blocks(128, 256, 64, 8, 3)}
FORWARD_OUTPUTS = frozenset({"lse", "target", "entropy", "top"})
PAYLOAD_BLOCKS = BLOCKS | {2: Blocks(64, 128, 64, 8, 3)}  # a tile of the payload is held beside that of the logits
SMALL_BLOCKS = BLOCKS | {2: Blocks(64, 64, 32, 8, 2)}
# Bytes of shared memory a program of BLOCKS[2] or FORWARD_BLOCKS[2] needs: A100, Hopper and B200 have them, GeForce
# cards do not.
LARGE_SHARED_MEMORY = 160 << 10
INTERPRETER_BLOCKS = Blocks(16, 32, 16, 1, 1)  # small, so that tests of a few rows visit several tiles
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
GRADIENTS = {"DH": "hidden", "DW": "weight", "DB": "bias"}
GRADIENTS |= {name + "2": "payload_" + tensor for name, tensor in GRADIENTS.items()}
SIZES = ("D", "stride_h", "stride_wv", "stride_wd")
STATE_OF = {"entropy": ("s1",), "variance": ("s1", "s2"), "payload": ("sp",), "log_sum_sq": ("sq",), "mean": ("sz",)}


def forward(problem: Problem) -> dict[str, Tensor]:
    """Every requested statistic, [N] each."""
    blocks = _check(problem, forward=True)
    count, size = len(problem.labels), problem.head.size
    splits, share = _splits(problem, blocks)
    states = _empty_states(problem, splits)
    target = problem.hidden.new_empty(count, dtype=wide(problem.hidden.dtype))
    if count:
        operands = {**_operands(problem, problem.payload, blocks), "TARGET": target, "share": share}
        operands |= {f.name.upper(): getattr(states, f.name) for f in fields(State)}
        operands["Y"] = problem.readable_columns.contiguous()
        row_blocks = triton.cdiv(count, blocks.rows)
        _launch(kernels._target_fwd, (row_blocks,), operands, blocks)
        _launch(kernels._stats_fwd, (row_blocks, splits), operands, blocks)
    values = finish(_fold(states), target, size)
    return {name: values[name].long() if name in ("top", "rank") else values[name] for name in problem.outputs}


def backward(
    problem: Problem, values: Mapping[str, Tensor], grads: Mapping[str, Tensor], share: Tensor | None = None
) -> dict[str, Tensor]:
    """Gradients of `sum(grads * statistics)` for every tensor in `problem.needs`; `share` as `chunked.backward`."""
    blocks = _check(problem)
    coef = coefficients(values, grads, problem.head.vocabulary)
    tensors = {
        name: t for name, t in zip(TENSORS, problem.tensors, strict=True) if name in problem.needs and t is not None
    }
    sums = {name: torch.zeros(t.shape, dtype=wide(t.dtype), device=t.device) for name, t in tensors.items()}
    if len(problem.labels) and sums:
        _alert_not_deterministic()
        grid = (triton.cdiv(len(problem.labels), blocks.rows), triton.cdiv(problem.head.size, blocks.columns))
        operands = _operands(problem, None if coef.d is None else problem.payload, blocks)
        operands |= {**_gradient_pointers(coef, sums), "LSE": values["lse"].contiguous(), "SHARE": share}
        _launch(kernels._stats_bwd, grid, operands, blocks)
    return {name: sums[name].to(t.dtype) for name, t in tensors.items()}


def survey(problem: Problem, upstream: Upstream, groups: list[slice]) -> Survey:
    """Statistics, coefficients, and the sums over columns that `tail` needs, in two visits that store no logits."""
    blocks, values = _check(problem), merge_ranks(problem, forward(problem))
    coef = coefficients(values, upstream(slice(0, len(problem.labels)), values), problem.head.vocabulary)
    a = coef.a.abs()
    largest = a.amax()
    energy, mass = (values["lse"].new_empty(len(groups), problem.head.size) for _ in range(2))
    operands = _operands(problem, None, blocks) | {
        "LSE": values["lse"].contiguous(),
        "GA": a / torch.where(largest > 0, largest, 1.0),
        "ENERGY": energy,
        "MASS": mass,
        "step": groups[0].stop,
    }
    _launch(kernels._survey, (triton.cdiv(problem.head.size, blocks.columns), len(groups)), operands, blocks)
    return Survey(values, Coefficients(a=coef.a, o=coef.o), energy.sum(0), mass)


def _check(problem: Problem, *, forward: bool = False) -> Blocks:
    """The blocks of the forward's kernels, or of all others. Raises: ValueError if they cannot run on these tensors."""
    device, dtype = problem.hidden.device, problem.hidden.dtype
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"impl is 'triton' but hidden is on {device}: move hidden and weight to a CUDA device, choose"
            " impl='chunked', or set TRITON_INTERPRET=1 before the first import to test the kernels slowly on a CPU"
        )
    if dtype not in DTYPES:
        raise ValueError(f"impl is 'triton' but hidden is {dtype}: choose one of {', '.join(map(str, DTYPES))}")
    if problem.mean_weight is not None:
        raise ValueError(
            "impl is 'triton' but class_weight is given with label smoothing, whose weighted mean of the logits its"
            " kernels do not have: choose impl='chunked'"
        )
    return INTERPRETER_BLOCKS if INTERPRETED else _blocks(problem, forward=forward)


def _alert_not_deterministic() -> None:
    """What torch does for operations whose sums have no fixed order, if `use_deterministic_algorithms` asks for it."""
    if torch.are_deterministic_algorithms_enabled():
        message = (
            "impl is 'triton', whose gradients are summed in no fixed order, but torch.use_deterministic_algorithms is"
            " set: choose impl='chunked', or set it with warn_only=True"
        )
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(message)
        warnings.warn(message, UserWarning, stacklevel=2)


def _blocks(problem: Problem, *, forward: bool = False) -> Blocks:
    """The blocks for the problem's dtype and the GPU's shared memory."""
    index = problem.hidden.device.index or 0
    memory = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    if memory < LARGE_SHARED_MEMORY:
        table = SMALL_BLOCKS
    elif problem.payload is not None:
        table = PAYLOAD_BLOCKS
    else:
        table = FORWARD_BLOCKS if forward and _is_light(problem) else BLOCKS
    return table[problem.hidden.element_size()]


def _is_light(problem: Problem) -> bool:
    """Whether the forward needs few enough registers for FORWARD_BLOCKS."""
    matrices: Any = (problem.hidden, problem.head.weight)  # tensors: `dispatch` refuses others
    aligned = all(x.stride(1) == 1 and x.stride(0) % 16 == 0 for x in matrices)
    return aligned and problem.outputs <= FORWARD_OUTPUTS and problem.head.bias is None


def _splits(problem: Problem, blocks: Blocks) -> tuple[int, int]:
    """Into how many parts the vocabulary is cut, a power of two, and the columns of a part, whole tiles.

    There are enough programs for four waves: with few rows the splits fill the device, with many there is one split.
    """
    tiles = triton.cdiv(problem.head.size, blocks.columns)
    splits = 2
    if not INTERPRETED:
        programs = 4 * torch.cuda.get_device_properties(problem.hidden.device).multi_processor_count
        splits = triton.next_power_of_2(triton.cdiv(programs, max(1, triton.cdiv(len(problem.labels), blocks.rows))))
    while splits > tiles:
        splits //= 2
    return splits, triton.cdiv(tiles, splits) * blocks.columns


def _empty_states(problem: Problem, splits: int) -> State:
    """Uninitialized states of every split, [splits, N] each; None for moments that no requested statistic needs."""
    names = {"m", "l"}.union(*(STATE_OF.get(name, ()) for name in problem.outputs))
    shape, dtype = (splits, len(problem.labels)), wide(problem.hidden.dtype)
    floats = {name: problem.hidden.new_empty(shape, dtype=dtype) for name in names}
    integers = {name: problem.labels.new_empty(shape, dtype=torch.int32) for name in {"top", "rank"} & problem.outputs}
    return State(**floats, **integers)


def _fold(states: State) -> State:
    """[splits, N] -> [N], neighbors first: ties of the maximum stay with the lower column."""
    while len(states.m) > 1:
        states = merge(_states_of(states, slice(0, None, 2)), _states_of(states, slice(1, None, 2)))
    return _states_of(states, 0)


def _states_of(states: State, index: slice | int) -> State:
    """The states of some splits."""
    parts = {f.name: getattr(states, f.name) for f in fields(State)}
    taken: dict[str, Any] = {name: None if part is None else part[index] for name, part in parts.items()}
    return State(**taken)


def _operands(problem: Problem, payload: Payload | None, blocks: Blocks) -> dict[str, Any]:
    """The operands of all kernels, by parameter name."""
    accumulator = DTYPES[wide(problem.hidden.dtype)]
    second_hidden, second_head = payload or (None, None)
    weights: Any = [head.weight for head in (problem.head, second_head) if head is not None]
    return {
        "Y": problem.label_columns.contiguous(),
        "N": len(problem.labels),
        "V": problem.head.size,
        "ACC": accumulator,
        "INDEX": tl.int32 if all(weight.stride(1) == 1 for weight in weights) else tl.int64,
        "BT": blocks.rows,
        "BV": blocks.columns,
        "BD": blocks.depth,
        **_head_operands(problem.hidden, problem.head, "", accumulator),
        **_head_operands(second_hidden, second_head, "2", accumulator),
    }


def _head_operands(hidden: Tensor | None, head: Any, suffix: str, accumulator: tl.dtype) -> dict[str, Any]:
    """One head's operands; without a head its pointers are None, so that the kernels leave it out."""
    if hidden is None:
        none = {"H": None, "W": None, "B": None, "scale": 1.0, "CAP": None, "DOT": accumulator}
        return {name + suffix: x for name, x in {**none, **dict.fromkeys(SIZES, 0)}.items()}
    operands = {
        "H": hidden,
        "W": head.weight,
        "B": None if head.bias is None else head.bias.contiguous(),
        "D": hidden.shape[1],
        "stride_h": hidden.stride(0),
        "stride_wv": head.weight.stride(0),
        "stride_wd": head.weight.stride(1),
        "scale": float(head.scale),
        "CAP": None if head.softcap is None else float(head.softcap),
        # Triton's interpreter takes bfloat16 for integers; products of low-precision inputs are exact in float32
        "DOT": accumulator if INTERPRETED else DTYPES[hidden.dtype],
    }
    return {name + suffix: x for name, x in operands.items()}


def _gradient_pointers(coef: Coefficients, sums: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Coefficients and sums by parameter name; None stands for a zero coefficient or a frozen tensor."""
    numbers = {f.name: getattr(coef, f.name) for f in fields(Coefficients)}
    coefs = {f"G{name.upper()}": None if x is None else x.contiguous() for name, x in numbers.items()}
    return {**coefs, **{name: sums.get(tensor) for name, tensor in GRADIENTS.items()}}


def _launch(kernel: Any, grid: tuple[int, ...], operands: Mapping[str, Any], blocks: Blocks) -> None:
    """Run a kernel on the operands it takes, with fused multiply-add, for which Triton's default varies."""
    arguments = {name: operands[name] for name in kernel.arg_names}
    with torch.cuda.device_of(operands["H"]):  # Triton launches on the current device
        kernel[grid](**arguments, num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=True)

"""Matrix products in the forms that BLAS runs fastest, written to existing buffers.

The forms that are faster on a CPU (batches of narrow products, the transpose) were found by timing; results are equal.
Shapes: n tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .head import Head
from .panels import Matrix, Scaled, converted, is_converted, panels
from .statistics import wide

PANEL, GROUP = 512, 4  # columns of a narrow product, and products per batch: their scratch stays in the cache
FEW_ROWS = 256
LOADED, EVEN = 8, 64  # 16-bit numbers of a GPU's widest load; columns of a tile


def project(hidden: Tensor, head: Head, out: Tensor) -> Tensor:
    """The raw products of a chunk, before scale and softcap, written to `out` [n, V]."""
    if head.adapter is not None:
        width = head.weight.shape[1]
        project(hidden[:, :width], replace(head, adapter=None), out)
        for part, rows in converted(head.adapter, hidden.dtype):
            out[:, part].addmm_(hidden[:, width:], rows.T)
        return out
    weight, _ = head.matrices["weight"]
    if not isinstance(weight, Tensor) or is_converted(weight, hidden.dtype):
        for part, rows in converted(weight, hidden.dtype):
            bias = None if head.bias is None else head.bias[part].to(hidden.dtype)
            project(hidden, Head(rows, bias), out[:, part])
        return out
    if whole := _whole(head.size, hidden):
        project(hidden, head[:whole], out[:, :whole])
        project(hidden, head[whole:], out[:, whole:])
        return out
    panels = head.size // PANEL
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32 and panels >= 2 * GROUP and len(hidden) > 1:
        _project_by_panels(hidden, weight, out)
        return out if head.bias is None else out.add_(head.bias)
    if head.bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(head.bias, hidden, weight.T, out=out)


def _project_by_panels(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """The same in batches of narrow products, which a CPU's BLAS runs faster for few rows and a wide head."""
    rows, step = len(hidden), GROUP * PANEL
    scratch = hidden.new_empty(GROUP, rows, PANEL)
    repeated = hidden.expand(GROUP, *hidden.shape)
    whole = weight.shape[0] // step * step
    for i in range(0, whole, step):
        torch.bmm(repeated, weight[i : i + step].unflatten(0, (GROUP, PANEL)).transpose(1, 2), out=scratch)
        out[:, i : i + step].unflatten(1, (GROUP, PANEL)).copy_(scratch.transpose(0, 1))
    if whole < weight.shape[0]:
        torch.mm(hidden, weight[whole:].T, out=out[:, whole:])


def matmul_into(total: Tensor, x: Tensor, y: Tensor, *, first: bool) -> None:
    """total = x @ y for the first product, total += x @ y for others; a wider total is added to in its own dtype."""
    if total.dtype != x.dtype:
        product = _wide_product(x, y, total.dtype)
        total.copy_(product) if first else total.add_(product)
    elif first and x.dtype == torch.float32 and len(x) <= FEW_ROWS and x.device.type == "cpu":
        # for few rows and a long inner dimension, a CPU's BLAS computes the transpose a tenth faster
        total.copy_(torch.mm(y.T, x.T).T)
    elif x.stride(1) == 1 and (whole := _whole(len(y), x)):
        matmul_into(total, x[:, :whole], y[:whole], first=first)
        total.addmm_(x[:, whole:], y[whole:])
    elif first:
        torch.mm(x, y, out=total)
    else:
        total.addmm_(x, y)


def add_hidden_gradient(total: Tensor, dz: Tensor, matrix: Matrix | Scaled, *, first: bool) -> None:
    """total [n, D] = dz [n, V] @ matrix [V, D] for the first product, total += dz @ matrix for others."""
    for part, rows in converted(matrix, dz.dtype):
        matmul_into(total, dz[:, part], rows, first=first and part.start == 0)


def add_matrix_gradient(total: Tensor, dz: Tensor, hidden: Tensor, *, first: bool) -> None:
    """total [V, D] = dz.T @ hidden for the first product, total += dz.T @ hidden for others.

    Where total has a narrower dtype, a panel at a time is multiplied, and rounded once.
    """
    for part in panels(total, dz.dtype):
        matmul_into(total[part], dz[:, part].T, hidden, first=first)


def add_scaled_gradient(
    total: Tensor | None, gain: Tensor | None, dz: Tensor, hidden: Tensor, scaled: Scaled, *, first: bool
) -> None:
    """The same for a matrix W whose rows have factors, and for these: dW = gain G, dgain_j = G_j W_j, G = dz.T hidden.

    `gain` [V], in the dtype of statistics, is added to; either sum may be None.
    """
    dtype = wide(dz.dtype)
    for part in panels(scaled, dtype):
        product = torch.mm(dz[:, part].T, hidden).to(dtype)
        if gain is not None:
            rows = next(converted(scaled.matrix[part], dtype))[1]
            gain[part] += torch.linalg.vecdot(product, rows)
        if total is not None:
            product *= scaled.gain[part, None]
            total[part].copy_(product) if first else total[part].add_(product)


def _has_wide_products(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch multiplies these 16-bit matrices into `dtype`."""
    return x.is_cuda and torch.version.hip is None and x.dtype != dtype == torch.float32


def _wide_product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ y of 16-bit matrices in `dtype`: where torch can do so, not rounded to 16 bits before it joins a sum."""
    if not _has_wide_products(x, dtype):
        return torch.mm(x, y)
    if whole := _whole(len(y), x):
        return _wide_product(x[:, :whole], y[:whole], dtype).add_(torch.mm(x[:, whole:], y[whole:], out_dtype=dtype))
    return torch.mm(x, y, out_dtype=dtype)


def _whole(size: int, operand: Tensor) -> int:
    """Of a vocabulary of this size, how much a GPU multiplies by itself, since an odd rest would slow all of it down.

    GPT-2's 50257 columns take five to six times as long in one product (benchmarks/results/h200). 0: all at once.
    """
    odd = operand.is_cuda and operand.element_size() == 2 and size % LOADED != 0 and size >= 2 * EVEN
    return size // EVEN * EVEN if odd else 0

"""Attention on fake tensors, with the memory that it takes with real ones on a GPU or a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _Flash(torch.autograd.Function):
    """A fused kernel of a GPU: beside its inputs it keeps its output, and a float32 number a query and head.

    A dropout keeps its seed, and groups of heads share their keys; kernels of CPUs keep a mask, and repeat the keys.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1])
        lse = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@contextmanager
def as_with_numbers(*, on_cpu: bool) -> Iterator[None]:
    """A context in which transformers' `sdpa` attention allocates what it does with real tensors.

    Transformers looks at a mask's numbers, and where there are none it makes a mask that hides nothing but the future.
    """
    from transformers.integrations.sdpa_attention import repeat_kv
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as KERNELS

    usual = MASKS["sdpa"]

    def mask(*args: Any, **kwargs: Any) -> Any:
        window = kwargs.get("local_size")
        return None if window is None or window > kwargs["kv_length"] else usual(*args, **kwargs)

    def kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        groups = query.shape[1] // key.shape[1]
        if mask is not None:  # the kernels for masks take no groups
            key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        return _Flash.apply(query, key, value), None

    MASKS["sdpa"] = mask  # for this context: the library's own shows again afterwards
    if not on_cpu:
        KERNELS["sdpa"] = kernel
    try:
        yield
    finally:
        del MASKS["sdpa"]
        if not on_cpu:
            del KERNELS["sdpa"]

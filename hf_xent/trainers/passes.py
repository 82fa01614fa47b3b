"""Several passes of a model over one batch, run as one forward pass over repeated inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def packed(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch is one row of several sequences, which only its position ids separate."""
    ids = inputs.get("input_ids")
    return (
        isinstance(ids, Tensor)
        and len(ids) == 1
        and inputs.get("position_ids") is not None
        and inputs.get("attention_mask") is None
    )


def repeated(inputs: Mapping[str, Any], copies: int) -> dict[str, Any]:
    """A model's inputs with the batch repeated; values other than tensors with rows are not changed.

    Rows are repeated, or, in a packed batch, the sequences of its row: attention kernels look for packing in single
    rows only. The sequence ends (`cu_seq_lens_q`, `cu_seq_lens_k`) and numbers (`seq_idx`) of a copy continue those of
    the copy before.
    """
    in_row = packed(inputs)
    width = inputs["input_ids"].shape[1] if in_row else 0
    batch = {}
    for name, x in inputs.items():
        if not isinstance(x, Tensor) or x.ndim == 0:
            batch[name] = x
        elif in_row and name.startswith("cu_seq_lens"):
            batch[name] = torch.cat([x[:1], *(x[1:] + i * x[-1] for i in range(copies))])
        elif in_row and name == "seq_idx":
            batch[name] = torch.cat([x + i * (x.max() + 1) for i in range(copies)], 1)
        elif name == "position_ids" and x.ndim == 3:  # [3, B, T] of models that place tokens in images
            batch[name] = torch.cat([x] * copies, 1 + in_row)
        else:
            batch[name] = torch.cat([x] * copies, int(in_row and x.ndim > 1 and x.shape[1] == width))
    return batch

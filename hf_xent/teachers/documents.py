"""The documents of a batch: the stretches of tokens that do not see each other, without padding.

A collator may pad rows on either side (`attention_mask`), or pack several documents into one row, separated by
`position_ids` that start again, by `seq_idx`, by `cu_seq_lens_q`, or by the numbers of an attention mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor


class Document(NamedTuple):
    """A document of a batch: its row, its columns, and its token ids [n], int32."""

    row: int
    columns: slice
    ids: np.ndarray


def documents_of(batch: Mapping[str, Any]) -> Iterator[Document]:
    """The documents of a batch in which something is predicted: those of one token, or without a label, are left out.

    Args:
        batch: `input_ids` [B, T], and whatever else the collator made.

    Raises:
        ValueError: The attention mask is not one number per token.
    """
    ids = batch["input_ids"].cpu().numpy().astype(np.int32)
    real, begins = _stretches(batch, ids.shape)
    labels = batch.get("labels")
    counted = np.ones(ids.shape, dtype=bool) if labels is None else labels.cpu().numpy() != -100
    for row in range(len(ids)):
        starts = np.flatnonzero(begins[row])
        for start, bound in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
            stop = start + int(real[row, start:bound].sum())
            if counted[row, start + 1 : stop].any():
                yield Document(row, slice(int(start), stop), ids[row, start:stop])


def _stretches(batch: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens are no padding, and which of them begin a document, [B, T] each."""
    numbers = np.ones(shape, dtype=np.int64)
    if (mask := batch.get("attention_mask")) is not None:
        if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
            form = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask is {form}: pass one number per token, {shape}, to a stored teacher")
        numbers = mask.cpu().numpy().astype(np.int64)
    real = numbers != 0
    begins = real.copy()
    begins[:, 1:] &= numbers[:, 1:] != numbers[:, :-1]
    for name, step in (("position_ids", 1), ("seq_idx", 0)):
        if isinstance(x := batch.get(name), Tensor):
            x = x[0] if x.ndim == 3 else x  # three axes, which are alike in text
            order = np.broadcast_to(x.cpu().numpy(), shape)
            begins[:, 1:] |= real[:, 1:] & (order[:, 1:] != order[:, :-1] + step)
    if isinstance(ends := batch.get("cu_seq_lens_q"), Tensor):
        starts = ends.cpu().numpy()
        starts = starts[starts < real.size]
        begins.reshape(-1)[starts] |= real.reshape(-1)[starts]
    return real, begins

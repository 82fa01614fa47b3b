"""Batches of speech, its transcript as CTC labels, and the transcript as a text encoder reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..speech.features import PadSpeech

TEXT, TEXT_MASK = "text_input_ids", "text_attention_mask"


@dataclass(frozen=True)
class SiameseCollator:
    """`hf_xent.speech.PadSpeech`, with the mask of the texts.

    Rows have `input_values`, a waveform [samples], or `input_features`, frames [T, bins]; `labels`, the ids of the
    transcript for CTC, without blanks; and `text_input_ids`, the same transcript for the text encoder, which may have
    another tokenizer. A batch has them, padded on the right, with `attention_mask` and `text_attention_mask`.

    Args:
        text_pad: The id that fills up `text_input_ids`.
    """

    text_pad: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch. Raises: ValueError for rows without speech, or where some lack a column that others have."""
        batch = PadSpeech({"labels": -100, TEXT: self.text_pad})([dict(row) for row in rows])
        if TEXT in batch:
            lengths = torch.tensor([len(row[TEXT]) for row in rows])
            batch[TEXT_MASK] = (torch.arange(batch[TEXT].shape[1]) < lengths[:, None]).long()
        return batch

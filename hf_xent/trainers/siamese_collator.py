"""Batches of speech, its transcript as CTC labels, and the transcript as a text encoder reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..models.padding import padded

SPEECH = ("input_values", "input_features")
TEXT, TEXT_MASK = "text_input_ids", "text_attention_mask"


@dataclass
class SiameseCollator:
    """Pads rows on the right.

    Rows have `input_values`, a waveform [samples], or `input_features`, frames [T, bins]; `labels`, the ids of the
    transcript for CTC, without blanks; and `text_input_ids`, the same transcript for the text encoder, which may have
    another tokenizer. A batch has them with `attention_mask` and `text_attention_mask`; rows without text make a batch
    without.

    Args:
        text_pad: The id that fills up `text_input_ids`.
    """

    text_pad: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch. Raises: ValueError for rows without speech, or where some lack a column that others have."""
        speech = next((name for name in SPEECH if name in rows[0]), None)
        if speech is None:
            raise ValueError(f"a row has {', '.join(rows[0])}: give {' or '.join(SPEECH)}")
        for name in (speech, "labels", TEXT):
            if len({row.get(name) is None for row in rows}) > 1:
                raise ValueError(f"{name} is in some rows of a batch but not in others: give it in all or in none")
        waves = [torch.as_tensor(row[speech], dtype=torch.float32) for row in rows]
        lengths = torch.tensor([len(wave) for wave in waves])
        batch = {speech: pad_sequence(waves, batch_first=True)}
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        if rows[0].get("labels") is not None:
            batch["labels"] = padded([_ids(row["labels"]) for row in rows], -100)[0]
        if rows[0].get(TEXT) is not None:
            batch[TEXT], batch[TEXT_MASK] = padded([_ids(row[TEXT]) for row in rows], self.text_pad)
        return batch


def _ids(values: Any) -> list[int]:
    ids: list[int] = torch.as_tensor(values).tolist()
    return ids

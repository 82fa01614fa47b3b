"""Batches of F2C's items, each asked in several formats, their logits, and checks of the true labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.formats import PromptFormats
from ..lazy import LazyLogits
from ..patching import lazily
from .batches import lazy

COLUMNS = ("prompts", "answers", "gold")
ROW = ("input_ids", "attention_mask", "answers")


@dataclass
class ItemCollator:
    """The data collator: `PromptFormats.collate`, and `gold` as evaluation reads it."""

    pad: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch, with `gold` [B] if a row has one, as a list if a value is not a number.

        Raises:
            ValueError: A row has no prompts or answers, or an answer has no tokens.
        """
        for row in rows:
            columns = [name for name, value in row.items() if value is not None]
            if not {"prompts", "answers"} <= {*columns}:
                raise ValueError(
                    f"a row has {', '.join(columns) or 'no values'}: F2C needs prompts and answers, as"
                    " hf_xent.data.PromptFormats.build makes them"
                )
            if not all(answer for answers in row["answers"] for answer in answers):
                raise ValueError(f"answers is {row['answers']}: every answer needs a token")
        batch: dict[str, Any] = PromptFormats.collate([{k: row[k] for k in COLUMNS[:2]} for row in rows], self.pad)
        if any("gold" in row for row in rows):
            gold = [row.get("gold") for row in rows]
            numbers = [number_of(value) for value in gold]
            batch["gold"] = gold if None in numbers else torch.tensor(numbers)
        return batch


def number_of(gold: Any) -> int | None:
    """The number of an answer, -1 where it is not known, and None for a value that is not a number."""
    if gold is None or gold != gold:  # pandas writes nan for None
        return -1
    try:
        return int(gold) if int(gold) == float(gold) else None
    except (TypeError, ValueError):
        return None


def check_gold(gold: Tensor | list[Any] | None, choices: int) -> None:
    """Raises: ValueError for a `gold` that is neither -1 nor the number of one of the `choices` answers."""
    values: Iterable[Any] = [] if gold is None else gold.tolist() if isinstance(gold, Tensor) else gold
    wrong = [value for value in values if number_of(value) not in range(-1, choices)]
    if wrong:
        raise ValueError(
            f"gold has {wrong[0]!r}: evaluation needs the number of the right answer, 0 to {choices - 1}, or"
            " -1 where it is not known; map the labels, or build the rows with label=None"
        )


def prefix_logits(model: nn.Module, ids: Tensor, mask: Tensor, answers: Tensor) -> LazyLogits:
    """Logits [n, L, V] of sequences [n, L], right up to the position that predicts the last token of the answer.

    That token is no input, so answers of one token have one forward of their prompt between them.
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    read = (mask > 0) & (place < torch.where(answers != -100, place, -1).amax(-1, keepdim=True))
    rows, inverse = torch.where(read, ids, -1).unique(dim=0, return_inverse=True)
    with lazily(model):
        output = model(input_ids=rows.clamp(min=0), attention_mask=(rows >= 0).to(mask.dtype))
    logits: Any = lazy(output.logits, ids.shape[1], "F2C")
    return logits[inverse]

"""Fine-tune by TRL's SFT pipeline, under any loss.

Data: as for TRL's SFTTrainer: texts, 'messages', or 'prompt' and 'completion'; packing and masks as there.
Example: hf-xent sft --dataset_name chats.jsonl --loss focal:gamma=2 --packing --max_length 512 --max_steps 100
"""

from __future__ import annotations

from typing import Any

from .base import Recipe, Setup, split_rows


class SFT(Recipe):
    """`StreamedSFTTrainer` from the command line."""

    trainer, config = "StreamedSFTTrainer", "sft:StreamedSFTConfig"

    def datasets(self, setup: Setup, model: Any, tokenizer: Any) -> dict[str, Any]:
        """The rows as they are: TRL's trainer tokenizes them."""
        from ..data.text import load_rows

        train, test = split_rows(setup.data, load_rows, setup.config.seed)
        return {"train_dataset": train, "eval_dataset": test}

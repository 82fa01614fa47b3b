"""The documents of a data set as TRL's trainers tokenize them, so that a cache has what training will look up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ..system.extras import needed


def tokenized(dataset: Any, tokenizer: Any, *, column: str = "text", max_length: int | None = 1024) -> Any:
    """A data set with `input_ids`, a document in each row; one that has them is returned as it is.

    Args:
        dataset: A `datasets.Dataset` of text, of `messages`, or of `prompt` and `completion`, as for `trl.SFTTrainer`.
        tokenizer: The tokenizer, with an EOS token, which ends texts, and a chat template if there are messages.
        column: The column of text.
        max_length: Tokens that are kept of a document, from its start; None for all. Training may use a shorter one.

    Raises:
        ValueError: The data set has none of these columns, or `max_length` is not positive.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}: choose a positive number, or None for whole documents")
    names = dataset.column_names
    if "input_ids" in names:
        return dataset
    if not {column, "messages", "conversations", "prompt"} & {*names}:
        raise ValueError(f"the data set has the columns {', '.join(names)}: name the one that holds text, column=...")
    with needed("train"):
        from trl import SFTTrainer

    # what its preparation reads of a trainer and of its configuration
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=False)
    args = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field=column,
        assistant_only_loss=False,
        max_length=max_length,
        truncation_mode="keep_start",
        shuffle_dataset=False,
    )
    return SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, args, False, None, "cached")

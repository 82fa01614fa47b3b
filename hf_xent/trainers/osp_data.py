"""The training data of OSP: prompts as token ids, and a data set whose rows are the pairs of the current round."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from torch.utils.data import Dataset as RowsByNumber


class Round(RowsByNumber):
    """The pairs of the current round; how many there are is known before they are made."""

    def __init__(self, length: int):
        self.length, self.number = length, -1  # the number of the round; -1 before the first one
        self.rows: Dataset | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert self.rows is not None  # made when the epoch began
        return self.rows[index]


def check_prompts(dataset: Any, columns: tuple[str, ...]) -> None:
    """Raises: ValueError unless the training set is a `datasets.Dataset` with these columns."""
    if not isinstance(dataset, Dataset) or not set(columns) <= set(dataset.column_names):
        raise ValueError(f"train_dataset has to be a datasets.Dataset with the columns {', '.join(columns)}")


def encode_prompts(dataset: Dataset, tokenizer: Any, max_length: int | None, max_new_tokens: int) -> Dataset:
    """Adds the token ids of the prompts. Raises: ValueError for a prompt that leaves no room for an answer."""
    longest = float("inf") if max_length is None else max_length - max_new_tokens

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        ids = encoded(row["prompt"], tokenizer)
        if len(ids) > longest:
            raise ValueError(
                f"a prompt has {len(ids)} tokens, with max_new_tokens {max_new_tokens} more than max_length"
                f" {max_length}: raise it or drop the prompt {row['prompt']!r}"
            )
        return {"prompt_ids": ids}

    return dataset.map(encode, desc="Tokenizing prompts")


def encoded(prompt: Any, tokenizer: Any) -> list[int]:
    """The token ids of a prompt, text or messages. Raises: ValueError for content that is not text."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    wrong = [message for message in prompt if not isinstance(message["content"], str)]
    if wrong:  # judges read text, and answers are sampled for text alone
        raise ValueError(
            f"a message of a prompt has content of type {type(wrong[0]['content']).__name__}: OSP takes text, give the"
            " content as a string and leave tool calls out"
        )
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])


def answer_like(prompt: Any, text: str) -> Any:
    """An answer in the form of its prompt: text, or a message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

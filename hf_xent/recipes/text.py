"""Recipes of language modeling: texts in blocks, and prompts with completions or chats, whose answers are learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .base import DataArguments, Recipe, Setup, split_rows


@dataclass
class TextArguments(DataArguments):
    """Where the texts come from, and how they become tokens."""

    dataset_text_field: str = field(
        default="text",
        metadata={"help": "The column of texts. Rows with 'messages', or 'prompt' and 'completion', need none."},
    )
    block_size: int = field(
        default=512, metadata={"help": "Tokens of a block of joined texts; the most that are kept of a chat or prompt."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 2:
            raise ValueError(f"block_size is {self.block_size}: choose 2 or more")


class TextRecipe(Recipe):
    """A recipe of a causal LM on texts, chats, or prompts with completions."""

    arguments = TextArguments

    def datasets(self, setup: Setup, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Blocks of text, or rows whose labels are the answers; padded by the collator."""
        from transformers import DataCollatorForSeq2Seq

        from ..models.anatomy import check_room

        data: TextArguments = setup.data
        check_room(model, data.block_size, "block_size")
        train, test = split_rows(
            data, lambda source, split: tokenized(source, split, data, tokenizer), setup.config.seed
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        return {"train_dataset": train, "eval_dataset": test, "data_collator": collator}


def tokenized(source: str, split: str | None, data: TextArguments, tokenizer: Any) -> Any:
    """Rows of `input_ids` and `labels`: blocks of joined texts, or chats and prompts whose answers are the labels.

    Raises:
        ValueError: The source cannot be read, or has none of the columns; or no row has a label that is kept.
    """
    from ..data.text import load_rows, load_text, pack

    rows = load_rows(source, split)
    columns, column = {*rows.column_names}, data.dataset_text_field
    is_chat = "messages" in columns
    if not is_chat and not {"prompt", "completion"} <= columns:
        return pack(load_text(source, split, column), tokenizer, data.block_size, column)

    def cut(row: Mapping[str, Any]) -> dict[str, list[int]]:
        whole = (
            _chat(row["messages"], tokenizer) if is_chat else _completion(row["prompt"], row["completion"], tokenizer)
        )
        return {name: ids[: data.block_size] for name, ids in whole.items()}

    encoded = rows.map(cut, remove_columns=rows.column_names, desc="tokenize")
    kept = encoded.filter(lambda row: any(label != -100 for label in row["labels"]), desc="drop rows without labels")
    if not len(kept):
        raise ValueError(
            f"block_size is {data.block_size}, which keeps no token of any answer in {source!r}: choose a larger one"
        )
    return kept


def _chat(messages: list[dict[str, Any]], tokenizer: Any) -> dict[str, list[int]]:
    """The tokens of a chat; the labels are the turns of the assistant."""
    from ..data.chat import chat_tokens

    turns = [turn if turn["role"] == "assistant" else {**turn, "weight": 0} for turn in messages]
    found = chat_tokens(tokenizer, turns)
    pairs = zip(found["input_ids"], found["token_weights"], strict=True)
    return {"input_ids": found["input_ids"], "labels": [token if weight else -100 for token, weight in pairs]}


def _completion(prompt: Any, completion: Any, tokenizer: Any) -> dict[str, list[int]]:
    """The tokens of a prompt and its completion, which ends with EOS and alone has labels; both may be chats."""
    if not isinstance(prompt, str):
        return _chat([*prompt, *completion], tokenizer)
    before = tokenizer(prompt)["input_ids"]
    if before[-1:] == [tokenizer.eos_token_id]:  # of a tokenizer that ends every text with it
        before = before[:-1]
    after = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": before + after, "labels": [-100] * len(before) + after}

"""How weights of labels come through TRL's preparation of a data set: inside its labels.

TRL tokenizes, masks, truncates and packs `input_ids` and `labels`, and drops other columns on the way. So a label that
counts carries its weight in its upper half while TRL cuts and joins rows, and is taken apart afterwards:

    label + 2^32 bits(w)          bits(w) the float32 of the weight; -100 if the label is ignored or its weight is 0
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset, Features, List, Value

from ..data.chat import KEY, chat_tokens, has_weights
from .weights import COLUMNS, ROW, TOKENS, row_weights

CHATS = ("messages", "conversations", "prompt", "completion")
"""The columns that may hold turns."""


def weighs(dataset: Any) -> bool:
    """Whether a data set has weights of rows, tokens or turns. Raises: ValueError for weights of tokens without these.

    Of a table its schema says so, of a stream the first row.
    """
    first: Any = next(iter(dataset), {})
    features = getattr(dataset, "features", None) or {}
    if TOKENS in first and "input_ids" not in first:
        raise ValueError(
            f"the data has a column {TOKENS} but no input_ids, whose tokens it could weigh: add them, or give {ROW} or"
            " weights of turns"
        )
    turns = (getattr(features.get(name), "feature", None) for name in CHATS)
    return (
        any(name in first for name in COLUMNS)
        or any(has_weights(first.get(name)) for name in CHATS)
        or any(isinstance(turn, Mapping) and KEY in turn for turn in turns)
    )


class Joined:
    """Turns a row that is tokenized into one whose labels carry their weights."""

    def __init__(self, tokenizer: Any, template: str | None):
        self.tokenizer, self.template = tokenizer, template

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row's labels. Raises: ValueError for weights that do not fit them."""
        weights = row_weights(row)
        turns = self._turns(row)
        if any(has_weights([turn]) for turn in turns):
            weights = weights * row_weights({"labels": row["labels"], TOKENS: self._weights_of(turns, row)})
        labels = torch.as_tensor(row["labels"], dtype=torch.int64)
        carried = labels + (weights.view(torch.int32).long() << 32)
        return {"labels": torch.where((labels == -100) | (weights == 0), -100, carried).tolist()}

    @staticmethod
    def _turns(row: Mapping[str, Any]) -> list[Any]:
        """The turns of a row that is a chat."""
        parts = [row.get(name) for name in ("messages", "prompt", "completion")]
        return [turn for part in parts if isinstance(part, list) for turn in part]

    def _weights_of(self, turns: list[Any], row: Mapping[str, Any]) -> list[float]:
        """The weight of each token's turn. Raises: ValueError if the tokens are not those of the rendered chat."""
        options = {"chat_template": self.template, "tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
        found = chat_tokens(self.tokenizer, turns, **options)
        if found["input_ids"] != row["input_ids"]:
            raise ValueError(
                "messages have weights, but the tokens of the row are not those of the rendered chat: give"
                " token_weights with input_ids instead"
            )
        return found["token_weights"]


def parted(row: Mapping[str, Any]) -> dict[str, Any]:
    """Labels and weights of a row that `Joined` has made, also after TRL has cut it or joined it with others."""
    carried = torch.as_tensor(row["labels"], dtype=torch.int64)
    valid = carried >= 0
    weights = torch.where(valid, carried >> 32, 0).int().view(torch.float32)
    labels = torch.where(valid, carried & 0xFFFFFFFF, -100)
    return {"labels": labels.tolist(), TOKENS: weights.tolist()}


def mapped(dataset: Any, function: Any, *written: str) -> Any:
    """A data set after a function of its rows, which reads the columns of weights and writes those that are named."""
    read = [name for name in COLUMNS if name in (dataset.column_names or ())]
    if not isinstance(dataset, Dataset):
        return dataset.map(function, remove_columns=read)
    types = {"labels": List(Value("int64")), TOKENS: List(Value("float32"))}
    kept = {name: x for name, x in dataset.features.items() if name not in read}
    features = Features({**kept, **{name: types[name] for name in written}})
    return dataset.map(function, remove_columns=read, features=features)

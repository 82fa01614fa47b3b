"""Texts with labels as tokens, for the recipes of encoders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .base import DataArguments

CITIES = "cities"
OF_CITIES = {"text_column": "question", "label_column": "continent"}
"""What 'cities' are classified by: the question names a city, and the label is its continent."""


@dataclass
class LabeledArguments(DataArguments):
    """Where the labeled rows come from."""

    dataset_name: str = field(
        default=CITIES,
        metadata={
            "help": "The rows: 'cities' (packaged, offline), a JSON, CSV or Parquet file, a folder, or a Hub id."
        },
    )
    text_column: str | None = field(
        default=None, metadata={"help": "The column of texts, or two with a comma for pairs; default: text."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "The column of labels; default: label, labels or target."}
    )
    max_length: int = field(default=256, metadata={"help": "Tokens that are kept of a text, from its start."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 2:
            raise ValueError(f"max_length is {self.max_length}: choose 2 or more")
        if self.dataset_name == CITIES:
            for name, column in OF_CITIES.items():
                setattr(self, name, getattr(self, name) or column)

    def labeled(self, source: str, split: str | None, task: str = "text") -> Any:
        """The rows of a source, as `hf_xent.data.rows.Labeled`.

        Raises:
            ValueError: The source cannot be read, or has no such columns or no labels.
        """
        from ..data.rows import LABELS, Columns, load_labeled

        inputs = tuple(name.strip() for name in (self.text_column or "").split(",") if name.strip())
        found = load_labeled(source, split, Columns(task=task, inputs=inputs, label=self.label_column))
        if found.labels is None:
            raise ValueError(
                f"{source} has no column {', '.join(LABELS['text'])}: name one with --label_column, of"
                f" {', '.join(found.found)}"
            )
        return found


def tokens_of(rows: Any, tokenizer: Any, max_length: int, **columns: Any) -> Any:
    """A `datasets.Dataset` of the tokens of texts, or of pairs of texts, with further columns."""
    from datasets import Dataset

    texts = [list(rows[name]) for name in ("text", "text_pair") if name in rows.column_names]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    return Dataset.from_dict({**{name: encoded[name] for name in encoded}, **columns})


def padded_by(model: Any, tokenizer: Any) -> None:
    """A model of the GPT kind pads by its end of text; its configuration has to say so."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = model.config.get_text_config()
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id

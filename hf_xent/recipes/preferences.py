"""Recipes of preferences: rows of a prompt with a chosen and a rejected answer, which TRL's trainers tokenize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .base import DataArguments, Recipe, Setup, split_rows

PAIR = ("chosen", "rejected")


@dataclass
class PreferenceArguments(DataArguments):
    """Where the preferences come from."""

    dataset_name: str = field(
        default="preferences",
        metadata={
            "help": "The pairs: 'preferences' (packaged, offline), a JSON, CSV or Parquet file, a folder, or a Hub id."
        },
    )


class PreferenceRecipe(Recipe):
    """A recipe of a trainer that is one of TRL's of preferences; adapters are made there, for the reference's sake."""

    arguments = PreferenceArguments
    shown: ClassVar[Mapping[str, str]] = {
        "beta": "How strongly the model is held to the reference.",
        "max_length": "The most tokens of a prompt with an answer.",
        "label_smoothing": "The share of labels that are taken for wrong (cDPO).",
        "precompute_ref_log_probs": "Ask the reference once, before the training.",
    }

    def model(self, setup: Setup) -> tuple[Any, Any]:
        """The model without adapters, which are in the keywords of the trainer, and its tokenizer."""
        from .models import load_causal_lm

        model, tokenizer = load_causal_lm(setup.model)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return model, tokenizer

    def datasets(self, setup: Setup, model: Any, tokenizer: Any) -> dict[str, Any]:
        """The rows as they are, and the adapters' configuration."""
        from .models import adapters_of

        train, test = split_rows(setup.data, self.rows, setup.config.seed)
        return {"train_dataset": train, "eval_dataset": test, "peft_config": adapters_of(setup.model)}

    @staticmethod
    def rows(source: str, split: str | None) -> Any:
        """The rows of a source, whose columns `preference_prob` and `weight` are numbers.

        Raises:
            ValueError: The source cannot be read, or has no pairs.
        """
        from ..data.text import load_rows

        rows = load_rows(source, split)
        if missing := [name for name in PAIR if name not in rows.column_names]:
            raise ValueError(
                f"{source} has no column {' and no '.join(missing)}, but {', '.join(rows.column_names)}: rename its"
                " columns to prompt, chosen and rejected"
            )
        return with_numbers(rows, source)


def with_numbers(rows: Any, source: str) -> Any:
    """The rows; the cells of CSV files are text, and those of strengths and weights become numbers.

    Raises:
        ValueError: A cell of these columns is no number.
    """
    from datasets import Value

    for name in ("preference_prob", "weight"):
        if name in rows.column_names and rows.features[name].dtype in ("string", "large_string"):
            try:
                rows = rows.cast_column(name, Value("float64"))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{source} has cells in its column {name} that are no numbers: {error}") from error
    return rows

"""Train for the same answer in all formats (F2C).

Data: rows with the columns that your formats name, and a column of labels, the number of the answer, if you have one.
Example: hf-xent f2c --dataset_name reviews.jsonl --formats formats.yaml --use_peft --max_steps 100
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .base import DataArguments, Recipe, Setup, split_rows

CITIES = "cities"


@dataclass
class F2CArguments(DataArguments):
    """Where the items come from, and how they are asked."""

    dataset_name: str = field(
        default=CITIES,
        metadata={
            "help": "The items: 'cities' (packaged, offline), a JSON, CSV or Parquet file, a folder, or a Hub id."
        },
    )
    formats: str | None = field(
        default=None,
        metadata={
            "help": "YAML file of a list of 'template', with columns in braces, and 'answers'; or that list itself, in"
            " the file of --config. Default: five formats of 'cities'."
        },
    )
    label_column: str = field(
        default="label",
        metadata={"help": "The column with the number of the right answer, read in evaluation; it may be missing."},
    )
    use_chat_template: bool = field(
        default=False, metadata={"help": "Ask in the tokenizer's chat template, if it has one."}
    )


class F2C(Recipe):
    """`F2CTrainer` from the command line."""

    trainer, config = "F2CTrainer", "f2c:F2CConfig"
    arguments = F2CArguments

    def check(self, setup: Setup) -> None:
        """Raises: ValueError if the data have no formats, or the formats are none."""
        from .formats import read_formats

        data: F2CArguments = setup.data
        if data.formats is None and data.dataset_name != CITIES:
            raise ValueError(
                f"formats is not given, and only {CITIES!r} has formats of its own: name a YAML file of the formats of"
                f" {data.dataset_name!r} with --formats"
            )
        read_formats(data.formats)

    def datasets(self, setup: Setup, model: Any, tokenizer: Any) -> dict[str, Any]:
        """The items in all formats, as tokens."""
        from ..data.text import load_rows
        from .formats import read_formats

        data: F2CArguments = setup.data
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        formats = read_formats(data.formats)

        def read(source: str, split: str | None) -> Any:
            rows = load_rows(source, split)
            return formats.build(rows, tokenizer, label=data.label_column, chat=data.use_chat_template)

        train, test = split_rows(data, read, setup.config.seed)
        return {"train_dataset": train, "eval_dataset": test}

"""Train a classifier for few false positives (DXO).

Data: a column 'text' with a 'label' of 0 and 1, or other labels of which --positive names the one that counts as 1.
Example: hf-xent dxo --model_name_or_path my/encoder --dataset_name texts.csv --loss pauc_cvar --max_steps 100
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .base import Recipe, Setup, split_rows
from .labeled import CITIES, LabeledArguments, padded_by, tokens_of


@dataclass
class DXOArguments(LabeledArguments):
    """Where the texts come from, and which label is the positive one."""

    positive: str | None = field(
        default=None,
        metadata={"help": "The label that counts as 1, all others as 0; default: 1, and 'Asia' for 'cities'."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_name == CITIES and self.label_column == "continent":
            self.positive = self.positive or "Asia"


class DXO(Recipe):
    """`DXOTrainer` from the command line."""

    trainer, config = "DXOTrainer", "dxo:DXOConfig"
    arguments = DXOArguments

    def model(self, setup: Setup) -> tuple[Any, Any]:
        """A classifier with one output, whose head is new unless the checkpoint has one."""
        from transformers import AutoModelForSequenceClassification

        from ..models.loading import tokenizer_of
        from .models import adapted, load

        tokenizer = tokenizer_of(setup.model.model_name_or_path)
        model = load(AutoModelForSequenceClassification, setup.model, new_head=True, num_labels=1)
        padded_by(model, tokenizer)
        return adapted(model, setup.model, "SEQ_CLS"), tokenizer

    def datasets(self, setup: Setup, model: Any, tokenizer: Any) -> dict[str, Any]:
        """The texts as tokens, with labels 0 and 1."""
        data: DXOArguments = setup.data

        def read(source: str, split: str | None) -> Any:
            found = data.labeled(source, split)
            labels = _binary(found.labels, data.positive, source)
            return tokens_of(found.rows, tokenizer, data.max_length, labels=labels)

        train, test = split_rows(data, read, setup.config.seed)
        return {"train_dataset": train, "eval_dataset": test}


def _binary(labels: list[Any], positive: str | None, source: str) -> list[int]:
    """Labels as 0 and 1. Raises: ValueError if there are others, or no row is positive."""
    known = sorted({str(label) for label in labels})
    if positive is None and not set(known) <= {"0", "1"}:
        raise ValueError(
            f"{source} has the labels {', '.join(known[:5])}{', ...' * (len(known) > 5)}: name the one that counts as 1"
            " with --positive"
        )
    if (positive or "1") not in known:
        raise ValueError(f"positive is {positive or '1'!r}, but {source} has the labels {', '.join(known[:5])}")
    return [int(str(label) == (positive or "1")) for label in labels]

"""The settings of a classifier's training, and who is told of its progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .fields import option
from .finetuning import Tuning

EPOCHS, SHARE = 3.0, 0.2
RATE, RATE_OF_NEW = 2e-5, 1e-3
"""Learning rates of checkpoints, and of new models."""
MODEL_HELP = (
    "The model: any Hub id or path of an encoder, decoder or classifier; 'tiny-vit' for images, 'gru' or 'mlp' for"
    " tables are new ones, with options as in 'gru:hidden=64'."
)
DATA_HELP = (
    "Rows with labels: a registered data set, a CSV, JSON or Parquet file, a folder of them, a folder with a folder of"
    " pictures for each class, or a Hub id."
)


@dataclass(frozen=True)
class Classifying(Tuning):
    """All settings of a classifier's training; each field is an option of `hf-xent classify`."""

    loss: str | None = option(
        "The loss, with options if any, such as 'focal:gamma=3'; `hf-xent losses --classes` lists all [default: the one"
        " that the model was trained with, or cross_entropy].",
        None,
    )
    model: str = option(MODEL_HELP, "")
    dataset: str = option(DATA_HELP, "")
    task: str = option("What is classified: text, tokens, image, table, or auto for what the columns tell.", "auto")
    column: str | None = option(
        "The column that is classified, or several with commas: a pair of texts, or numbers of a table [default: text,"
        " tokens, image, values, or all columns of numbers].",
        None,
    )
    label: str | None = option("The column of labels [default: label, labels or target; tags of tokens].", None)
    epochs: float | None = option(f"How often each row is seen [default: {EPOCHS:g}].", None)
    steps: int | None = option(
        "Optimizer steps, in place of epochs; 0 trains nothing: a trained classifier is evaluated on all rows.",
        None,
        min=0,
    )
    batch_size: int = option("Rows per forward pass.", 16, min=1)
    learning_rate: float | None = option(  # type: ignore[assignment]  # None is replaced before it is used
        f"Peak learning rate of AdamW, decayed linearly [default: {RATE:g}, and {RATE_OF_NEW:g} for new models].", None
    )
    max_length: int | None = option("Tokens that are kept of a text, from its start [default: 256].", None, min=2)
    eval_share: float | None = option(f"Share of the rows that is held out for evaluation [default: {SHARE}].", None)
    class_weights: str | None = option("'balanced', or a weight for each class with commas: '1,2.5'.", None)
    second: str | None = option(
        "Where the second logits of losses that need them come from: 'average' (a moving average of the model), 'model'"
        " (another pass with dropout), or the path of a teacher, a trained classifier [default: average].",
        None,
    )
    momentum: float | None = option("Momentum of the moving average [default: 0.999].", None)
    lora: int = option(
        "Rank of LoRA adapters, which are merged when the model is saved; 0 trains all weights.", 0, min=0
    )
    new_head: bool = option("Give a model that is a classifier already a new head.", False)
    predict: str | None = option(
        "Rows to predict after training, with or without labels [default: the held-out rows].", None
    )
    predict_split: str | None = option("Split of the rows to predict, such as 'test'.", None)
    predictions: str | None = option("CSV file for predictions [default: predictions.csv in the output folder].", None)
    output: str = option("Folder for the model, its checkpoints, predictions.csv and results.json.", "out/classify")
    more: dict[str, Any] = field(default_factory=dict)
    """Further fields of the trainer's configuration: name -> value."""

    def check(self, loss: Any) -> None:
        """Raises: ValueError for options that cannot be used under the loss, or have no effect."""
        if loss.labels == "masks":
            raise ValueError(
                f"loss is {self.loss!r}, which is of images of labels: train it with hf_xent.trainers.ClassTrainer"
            )
        for name in ("epochs", "eval_share"):
            value, upper = getattr(self, name), 1 if name == "eval_share" else math.inf
            if value is not None and not 0 < value < upper:
                raise ValueError(f"{name} is {value:g}: choose a number between 0 and {upper:g}")
        for unread, reason in self._unread(loss).items():
            raise ValueError(f"{unread} is given, but {reason}: leave it out")
        self._check_teacher(loss)

    def check_sources(self) -> None:
        """Raises: ValueError if the model or the data are not named."""
        for name in ("model", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"{name} is not given: name one with --{name}")

    def _check_teacher(self, loss: Any) -> None:
        """Raises: ValueError if nothing would be learned but what the model itself says."""
        of_tokens: Any = getattr(loss, "loss", None)
        copies = self.second in (None, "average", "model")
        if copies and self.steps != 0 and getattr(of_tokens, "needs_teacher", False) and not of_tokens.ce_weight:
            raise ValueError(
                f"second is {self.second or 'not given'}, but {self.loss} learns nothing but what the teacher says:"
                f" name a classifier with --second, or set the loss to '{self.loss}:ce_weight=0.5'"
            )

    def _unread(self, loss: Any) -> dict[str, str]:
        """Options that have no effect -> why."""
        reasons = {}
        if self.steps is not None:
            reasons["epochs"] = f"steps is {self.steps}"
        if self.steps == 0:
            names = ("eval_share", "save_steps", "resume", "lora", "new_head", "class_weights", "second", "momentum")
            reasons |= dict.fromkeys(names, "steps is 0, which trains nothing")
        if "second" not in loss.needs:
            reasons |= dict.fromkeys(("second", "momentum"), f"{self.loss} needs no second logits")
        elif self.second not in (None, "average"):
            reasons["momentum"] = f"second is {self.second!r}, no average"
        if not self.predict:
            reasons["predict_split"] = "predict is not"
        return {name: reason for name, reason in reasons.items() if getattr(self, name)}


@dataclass(frozen=True)
class Report:
    """Functions that are told how far a run is."""

    step: Callable[[int], None] = lambda step: None
    """Called with the number of the step that begins."""
    phase: Callable[[str], None] = lambda phase: None
    """Called with the name of what begins: 'reading the rows', 'training', ..."""
    total: Callable[[int], None] = lambda steps: None
    """Called once, with the number of steps."""

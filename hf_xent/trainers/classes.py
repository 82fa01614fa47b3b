"""Classifiers under a loss of classes (`hf_xent.classes`): any of them, in one trainer for models of transformers.

The loss tells what it needs: the width of the head, to which the model is resized when the trainer is made, and columns
of the data, which are kept and handed to it. Labels of -100 are ignored, with their rows.

A loss per row is summed and divided by the number of labels in all accumulated batches of all processes, so that 1 x 8
rows are 8 x 1. A loss of the batch is averaged over accumulated batches, which is not the loss of all their rows.

Evaluation gives the same loss, and `predictions` are classes (`loss.predict`), for `compute_metrics` and in `predict`.

Source: the loss's own; Lee et al. 2025, arXiv:2501.13341, for `aspects`.
Data: the model's inputs, `labels`, and the columns of the loss, which evaluation sets may lack if the loss has a value
without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from .. import classes
from ..classes.base import ClassLoss
from ..hub import Carded, Tokenless
from ..patching.heads import inner_of
from .base import Method, Options
from .refusals import OWN_LOSS
from .rows import IDS


@dataclass
class ClassConfig(Options, Tokenless, TrainingArguments):
    """`transformers.TrainingArguments` and the loss.

    Raises:
        ValueError: A field has a value of another type.
    """

    loss: str = field(
        default="aspects", metadata={"help": "A loss of hf_xent.classes; with options: 'aspects:questions=8, alpha=4'."}
    )


class ClassTrainer(Method, Carded, Trainer):
    """Trains a classifier of transformers under a loss of classes; see the module's docstring.

    Args:
        model: A classifier, such as AutoModelForSequenceClassification; its head is resized for the loss
            (`hf_xent.classes.resize`), which is written into its configuration. A PEFT model has to be resized before.
        args: The configuration; `ClassConfig(output_dir="out")` if it is left out.
        loss: Registry name or `hf_xent.classes.ClassLoss`; it takes precedence over `args.loss`.
        **kwargs: As for `transformers.Trainer`. A `preprocess_logits_for_metrics` replaces the choice of classes.

    Raises:
        ValueError: A loss that is unknown, a model without a head of classes, a training set without a column that the
            loss needs, the configuration of another trainer, or options that do not fit; in training, a batch without
            labels.
    """

    config_class = ClassConfig
    args: ClassConfig
    columns: Mapping[str, str] = dict.fromkeys(("input_ids", "attention_mask"), IDS)
    refused_arguments: Mapping[str, str] = {
        "model_init": "the head is resized once, when the trainer is made: pass model instead",
        "compute_loss_func": OWN_LOSS,
    }
    refused_options: Mapping[str, str] = {
        "label_smoothing_factor": "the loss of classes decides what labels are: leave it 0",
    }
    _signature_columns: Any

    def __init__(
        self, model: Any, args: ClassConfig | None = None, *, loss: str | ClassLoss | None = None, **kwargs: Any
    ):
        args = self.configured(args, kwargs)
        self.objective = classes.get(loss or args.loss)
        self._fit_head(model)
        self._check_columns(kwargs.get("train_dataset"))
        if kwargs.get("preprocess_logits_for_metrics") is None:
            kwargs["preprocess_logits_for_metrics"] = self._predicted
        self.averages_items = not self.objective.per_row  # training_step then divides by the accumulated batches
        super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = self.objective.per_row  # the labels of a step are counted for us

    def _fit_head(self, model: Any) -> None:
        """Resizes the head. Raises: ValueError for what is no model, or a PEFT model that has not been resized."""
        inner_of(model)
        if not hasattr(model, "peft_config"):
            classes.resize(model, self.objective)
        elif not getattr(model.config, "hf_xent_loss", None):
            raise ValueError(
                f"model is a {type(model).__name__} whose head was not resized: call hf_xent.classes.resize(model,"
                f" {self.objective!r}) before the adapter is added"
            )

    def _check_columns(self, dataset: Any) -> None:
        known = getattr(dataset, "column_names", None) or self.objective.columns  # not known before it is read
        if missing := [column for column in self.objective.columns if column not in known]:
            raise ValueError(
                f"train_dataset has the columns {', '.join(known)}, but {self.objective!r} needs {', '.join(missing)}:"
                " add the column"
            )

    def _predicted(self, logits: Any, labels: Any) -> Tensor:
        """The classes, instead of logits."""
        return self.objective.predict(logits[0] if isinstance(logits, tuple) else logits)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self.objective.columns]))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the rows with a label.

        Raises:
            ValueError: A batch has no labels, a batch of training lacks a column of the loss, or the model has another
                number of outputs than the loss needs.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        columns = {name: inputs.pop(name) for name in self.objective.columns if name in inputs}
        missing = [name for name in self.objective.columns if name not in columns] if model.training else []
        if labels is None or missing:
            raise ValueError(f"a batch has {', '.join(inputs)}: give labels{''.join(f' and {m}' for m in missing)}")
        outputs = model(**inputs)
        logits = outputs["logits"]
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"{type(inner_of(model)).__name__} has logits of shape {tuple(logits.shape)} for labels of shape"
                f" {tuple(labels.shape)}: pass a classifier with one row of logits for every label"
            )
        kept = labels != -100
        columns = {name: values[kept] for name, values in columns.items()}
        loss = self.objective(logits[kept].float(), labels[kept], **columns)
        if self.objective.per_row:
            count = kept.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = loss.sum() / count
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # DDP averages gradients, the count is of all processes
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As `Trainer`; rows without labels may have the columns of the loss, which the model does not take."""
        if "labels" not in inputs:
            inputs = {name: value for name, value in inputs.items() if name not in self.objective.columns}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

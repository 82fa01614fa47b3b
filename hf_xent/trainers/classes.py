"""Classifiers under a loss of classes (`hf_xent.classes`): any of them, in one trainer for models of transformers.

The loss tells what it needs, and the trainer gives it: a head of its width, to which the model is resized; features,
from the head's inputs; logits of a second pass; logits of inputs that were moved (`perturbation`); columns of the data,
which are kept; and a state of its own, which is trained and saved in checkpoints beside the model. `class_rows`
describes the classifiers and their labels.

A loss per row is summed and divided by the number of labels in all accumulated batches of all processes, so that 1 x 8
rows are 8 x 1; class weights multiply both sums. A loss of the batch is averaged over accumulated batches and
processes, which is not the loss of all their rows; with `gather` it is that of the rows of all processes. If a model
returns `side_logits`, their losses are added (`deep_supervision`).

Evaluation gives the same loss, and `predictions` are classes (`loss.predict`), for `compute_metrics` and in `predict`.

Source: the loss's own; Lee et al. 2025, arXiv:2501.13341, for `aspects`.
Data: the model's inputs, `labels` (or `start_positions` and `end_positions`), and the columns of the loss, which
evaluation sets may lack if the loss has a value without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from .. import classes
from ..classes.base import ClassLoss
from ..classes.heads import classes_of
from ..hub import Carded, Tokenless
from ..patching.heads import inner_of
from . import class_state
from .base import Method, Options
from .class_rows import POSITIONS, RowReader, Rows, at_size
from .class_sampling import Lists, gathered
from .class_setup import check_data, check_effect, class_weights, fit_head
from .deep_supervision import check_supervision, supervised
from .perturbation import Perturbation
from .refusals import OWN_LOSS
from .rows import IDS


@dataclass
class ClassConfig(Options, Tokenless, TrainingArguments):
    """`transformers.TrainingArguments`, the loss, and how it is summed.

    Raises:
        ValueError: A field has a value of another type.
    """

    loss: str = field(
        default="cross_entropy",
        metadata={"help": "A loss of hf_xent.classes; with options: 'aspects:questions=8, alpha=4'."},
    )
    class_weights: list[float] | str | None = field(
        default=None,
        metadata={
            "help": "A weight >= 0 for every class, for losses per row; 'balanced': N / (K N_k), as in scikit-learn."
        },
    )
    second: str = field(
        default="average",
        metadata={
            "help": "What the second pass of losses that need one is of: 'average', a moving average of the model, or"
            " 'model', the model itself, with another dropout. The argument `second` of the trainer replaces it."
        },
    )
    momentum: float = field(default=0.999, metadata={"help": "The momentum of the moving average, for 'average'."})
    gather: bool = field(
        default=False, metadata={"help": "Whether a loss of the batch is that of the rows of all processes."}
    )
    deep_supervision: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weights >= 0 of the losses of a model's `side_logits`: one for all, or one for each; 1 by default."
        },
    )

    choices = {"second": ("average", "model")}  # noqa: RUF012
    ranges = {"momentum": "[0, 1)"}  # noqa: RUF012


class ClassTrainer(Method, Carded, Trainer):
    """Trains a classifier of transformers under a loss of classes; see the module's docstring.

    Args:
        model: A classifier, such as AutoModelForSequenceClassification; its head is resized for the loss
            (`hf_xent.classes.resize`), which is written into its configuration. A PEFT model has to be resized before.
        args: The configuration; `ClassConfig(output_dir="out")` if it is left out.
        loss: Registry name or `hf_xent.classes.ClassLoss`; it takes precedence over `args.loss`.
        second: A model with the same inputs and outputs, for losses that need a second pass, such as the teacher of
            'forward_kl'; it takes precedence over `args.second`.
        **kwargs: As for `transformers.Trainer`. A `preprocess_logits_for_metrics` replaces the choice of classes.

    Raises:
        ValueError: A loss that is unknown, a model that is not a classifier or has too few classes, a training set
            without a column that the loss needs or with labels of another kind, the configuration of another trainer,
            or options that do not fit or have no effect; in training, a batch without labels.
    """

    config_class = ClassConfig
    args: ClassConfig
    columns: Mapping[str, str] = dict.fromkeys(("input_ids", "attention_mask"), IDS)
    refused_arguments: Mapping[str, str] = {
        "model_init": "the head is resized once, when the trainer is made: pass model instead",
        "compute_loss_func": OWN_LOSS,
    }
    refused_options: Mapping[str, str] = {
        "label_smoothing_factor": "the loss of classes decides what labels are: leave it 0, or use"
        " 'cross_entropy:label_smoothing=0.1'",
    }
    _signature_columns: Any

    def __init__(
        self,
        model: Any,
        args: ClassConfig | None = None,
        *,
        loss: str | ClassLoss | None = None,
        second: nn.Module | None = None,
        **kwargs: Any,
    ):
        args = self.configured(args, kwargs)
        self.objective = classes.get(loss or args.loss)
        check_effect(args, self.objective, second)
        check_supervision(args.deep_supervision, self.objective)
        set_seed(args.seed)  # as the stock trainer does, but before the head and the state are drawn
        fit_head(model, self.objective)
        self.reader = RowReader(model, self.objective)
        self._perturbation = Perturbation.of(self.objective, self.reader, model, kwargs.get("processing_class"))
        dataset = kwargs.get("train_dataset")
        check_data(dataset, self.objective)
        self._weights = None if args.class_weights is None else class_weights(args.class_weights, dataset, model)
        self._state = class_state.attach(model, self._new_state(model), next(model.parameters()))
        if kwargs.get("preprocess_logits_for_metrics") is None:
            kwargs["preprocess_logits_for_metrics"] = self._predicted
        self.averages_items = not self.objective.per_row  # training_step then divides by the accumulated batches
        super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = self.objective.per_row  # the labels of a step are counted for us
        self._second: Any = second
        self._average: class_state.AveragedTeacher | None = None
        self._set_state()
        self._set_second()

    def _new_state(self, model: Any) -> nn.Module | None:
        head = self.reader.head
        return self.objective.state(0 if head is None else head.in_features, classes_of(model))

    def _set_state(self) -> None:
        """Prepares the state for several processes.

        Raises:
            ValueError: The weights are in parts, and the loss needs whole ones.

        Under FSDP and DeepSpeed a rank has whole weights within the model's forward alone.
        """
        trains = self._state is not None and any(True for _ in self._state.parameters())
        head = self.reader.head
        reads = "head" in self.objective.needs or (head is not None and self.objective.penalty(head) is not None)
        moves = self._perturbation is not None
        if (trains or reads or moves) and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            what = "trains layers beside the model" if trains else "reads the weights of the head"
            what = "searches for inputs with whole weights" if moves else what
            raise ValueError(f"loss is {self.objective!r}, which {what}: train it without FSDP and DeepSpeed")
        if self._state is not None and trains and self.args.world_size > 1:
            class_state.average_over_ranks(self.model, self._state)

    def _set_second(self) -> None:
        """Prepares the model of the second pass."""
        if "second" not in self.objective.needs:
            return
        if self._second is not None:
            inner_of(self._second)
            self._second = self._second.to(self.args.device).eval()
        elif self.args.second == "average":
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("second is 'average', a copy of the whole model: train without FSDP and DeepSpeed")
            self._average = class_state.AveragedTeacher(self.args.momentum)
            unwrapped = lambda: self.accelerator.unwrap_model(self.model)  # noqa: E731
            self.add_callback(class_state.Averaging(self._average, unwrapped))

    def _predicted(self, logits: Any, labels: Any) -> Tensor:
        """The classes, instead of logits; [B, 2] of start and end in question answering."""
        if self.reader.answers:
            return torch.stack([self.objective.predict(part) for part in logits[:2]], 1)
        first = logits[0] if isinstance(logits, tuple) else logits
        if first.ndim == 4:
            first = (first if labels is None else at_size(first, labels)).movedim(1, -1)
        return self.objective.predict(first)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self.objective.columns]))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As the stock trainer; rows that belong together stay together under the default strategy."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.objective.together and self.args.train_sampling_strategy == "random":
            return Lists(dataset, self.objective.together, self.args)
        return super()._get_train_sampler(train_dataset)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The number of labels in the batches of a step, or the sum of their class weights; None for batch losses."""
        if not self.objective.per_row or not batch_samples:
            return None
        total = sum(self._counted(self.reader.labels(batch)) for batch in batch_samples)
        return self._counted_over_processes(total, device)

    def _counted(self, labels: Tensor) -> Tensor:
        """The number of labels, or the sum of their weights."""
        kept = labels[self.reader.kept(labels)]
        return torch.as_tensor(kept.numel()) if self._weights is None else self._weights.to(kept.device)[kept].sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of the rows with a label.

        Raises:
            ValueError: A batch has no labels, a batch of training lacks a column of the loss, or the model has another
                number of outputs than the loss needs.
        """
        inputs, labels = dict(inputs), self.reader.labels(inputs)
        columns = {name: inputs.pop(name) for name in self.objective.columns if name in inputs}
        missing = [name for name in self.objective.columns if name not in columns] if model.training else []
        inputs = {name: value for name, value in inputs.items() if name not in ("labels", *POSITIONS)}
        if missing:
            raise ValueError(f"a batch has {', '.join(inputs)}: give {' and '.join(missing)}")
        rows, outputs = self.reader.read(model, inputs, labels, columns)
        if "second" in self.objective.needs:
            rows.given["second"] = self._second_logits(model, inputs, labels)
        if self._perturbation is not None:
            unwrapped, step = self.accelerator.unwrap_model(model), self.state.global_step if model.training else -1
            rows.given["perturbed"] = self._perturbation(unwrapped, inputs, labels, (self.args.seed, step))
        sides = supervised(self.args.deep_supervision, outputs, labels, rows, self.reader)
        loss = self._reduced(self.reader.labelled(rows), model, num_items_in_batch)
        for weight, side in sides:
            loss = loss + weight * self._reduced(self.reader.labelled(side), model, num_items_in_batch)
        accumulated = self.current_gradient_accumulation_steps if self.objective.per_row and model.training else 1
        penalty = None if self.reader.head is None else self.objective.penalty(self.reader.head)
        loss = loss if penalty is None else loss + penalty / accumulated
        return (loss, _without_states(outputs)) if return_outputs else loss

    def _second_logits(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
        """Those of the second pass, row by row."""
        averaged = None if self._average is None else self._average.model
        second = self._second if self._second is not None else model if averaged is None else averaged
        with torch.no_grad():
            return self.reader.logits(second(**inputs), labels)

    def _reduced(self, rows: Rows, model: nn.Module, num_items: Any) -> Tensor:
        """The loss of the rows as a number."""
        objective = self.objective
        if "head" in objective.needs:
            rows.given["head"] = self.reader.head
        if self._state is not None:
            rows.given["state"] = self._state
        if self.args.gather and self.args.world_size > 1 and model.training:
            rows = gathered(rows, self.accelerator)
        loss = objective(rows.logits, rows.labels, **rows.given)
        if objective.per_row:
            weighted = loss if self._weights is None else loss * self._weights.to(loss.device)[rows.labels]
            count = self._counted(rows.labels).clamp(min=1) if num_items is None else num_items
            loss = weighted.sum() / count
            if num_items is not None:
                loss = loss * self._averaged_by
        return loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As `Trainer`; rows without labels may have the columns of the loss, which the model does not take."""
        if any(inputs.get(name) is None for name in self.label_names):
            inputs = {name: value for name, value in inputs.items() if name not in self.objective.columns}
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            class_state.save(self._state, output_dir)
            if self._average is not None:
                self._average.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            class_state.load(self._state, checkpoint)
            if self._average is not None:
                self._average.load(checkpoint, self.accelerator.unwrap_model(self.model))


def _without_states(outputs: Any) -> dict[str, Tensor]:
    """The outputs that predictions are made of: logits alone."""
    return {name: outputs[name] for name in ("logits", "start_logits", "end_logits") if name in outputs}

"""Deep X-risk optimization (DXO): a classifier trained for its ranking at low false positive rates, not for accuracy.

The loss is one of `hf_xent.ranking`, over pairs of a positive (label 1) and a negative: by default tpAUC-KL, of the
two-way partial AUC. What differs from training under cross-entropy:

    batches    a share `sampling_rate` of every batch is positive (DualSampler); None shuffles all rows, as for BCE
    state      a moving average for each training row: saved in checkpoints, resumed, not changed by evaluation
    ranks      pairs are made of the scores of all ranks: two ranks of B rows equal one of 2 B, and share their state
    stages     updates before `warm_start` are under BCE, at `learning_rate`; the later ones at `dxo_learning_rate`
    selection  evaluation reports `tpauc` (FPR <= max_fpr, TPR >= min_tpr), by which checkpoints are compared

Pairs are made within a micro-batch: `gradient_accumulation_steps` averages losses, it does not add pairs. The loss of
evaluation is BCE whichever loss trains: it is comparable between losses and defined for any batch.

The defaults of loss, rate, and selection are those of the published DACTYL detector; its optimizer, SOTAs of LibAUC, is
Adam with gradients clamped to 1, so AdamW without weight decay here. The two stages follow LibAUC's advice (BCE first,
then a smaller learning rate); DACTYL's own small classifiers may or may not have had them. In the published tables DXO
is below BCE for small encoders.

Source: Thorat and Caines 2025, arXiv:2508.00619; Yuan et al. 2023, LibAUC, KDD.
Data: a `datasets.Dataset` with the model's inputs and `labels` (or `label`), 0 or 1.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import EvalPrediction, Trainer, TrainingArguments

from .. import ranking
from ..hub import Carded, Tokenless
from ..patching.heads import inner_of
from .base import Method, Options
from .dxo_labels import LABELS, ROW, SamplerEpochs, check_labels, labels_of, numbered, without_unknown
from .dxo_scores import gathered, ranking_metrics, scores_of
from .refusals import NO_MODEL_INIT, OWN_LOSS, refuse_options
from .rows import IDS

NO_CLASSIFIER = "model is a {}, and DXO trains classifiers of texts: use AutoModelForSequenceClassification"
STATE = "dxo_state.safetensors"


@dataclass
class DXOConfig(Options, Tokenless, TrainingArguments):
    """`transformers.TrainingArguments` and the options of DXO.

    Raises:
        ValueError: A field has a value out of its range or of another type, or `dxo_learning_rate` is set without a
            warm start.
    """

    ranges: ClassVar[dict[str, str]] = {
        "sampling_rate": "(0, 1)",
        "warm_start": "[0, inf)",
        "dxo_learning_rate": "(0, inf)",
        "max_fpr": "(0, 1]",
        "min_tpr": "[0, 1)",
    }

    loss: str = field(
        default="tpauc_kl",
        metadata={"help": "bce, aucm, pauc_cvar, pauc_dro, tpauc_kl or ap; with options: 'pauc_cvar:beta=0.1'."},
    )
    sampling_rate: float | None = field(
        default=0.5, metadata={"help": "Share of positives in every batch; None shuffles all rows."}
    )
    warm_start: float = field(
        default=0.0,
        metadata={"help": "Number of updates under BCE before those under the loss; below 1, a share of all updates."},
    )
    dxo_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate after the warm start; None does not change it."}
    )
    max_fpr: float = field(default=0.05, metadata={"help": "Largest FPR of pauc and tpauc in evaluation."})
    min_tpr: float = field(default=0.8, metadata={"help": "Smallest TPR of tpauc in evaluation."})
    metric_for_best_model: str | None = field(
        default="tpauc", metadata={"help": "tpauc, pauc, auroc, ap, tpr_1, tpr_5, loss or one of compute_metrics."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warm_start > 1 and self.warm_start % 1:
            raise ValueError(f"warm_start is {self.warm_start}: choose a share below 1, or a whole number of updates")
        if self.dxo_learning_rate is not None and not self.warm_start:
            raise ValueError(
                f"dxo_learning_rate is {self.dxo_learning_rate} but warm_start is 0: set learning_rate, or a warm start"
            )


class DXOTrainer(Method, Carded, Trainer):
    """Trains any `AutoModelForSequenceClassification` of one or two labels; see the module's docstring.

        score = logit (one label) or logit_1 - logit_0 (two)          loss: BCE, then `hf_xent.ranking` of all scores

    A model of one label is set to `problem_type="multi_label_classification"`, so that its pipeline applies a sigmoid
    (by default transformers takes it for a regression). Evaluation reports `auroc`, `ap`, `pauc`, `tpauc`, `tpr_1` and
    `tpr_5` (TPR at 1 % and 5 % FPR) beside the metrics of `compute_metrics`.

    Args:
        model: A classifier of sequences.
        args: The configuration; `DXOConfig(output_dir="out")` if it is left out.
        loss: Registry name or `hf_xent.ranking.RankingLoss`; it takes precedence over `args.loss`.
        train_dataset: A `datasets.Dataset` with the model's inputs and a column `labels` (or `label`), 0 or 1.
        compute_metrics: More metrics, as for `transformers.Trainer`.
        **kwargs: As for `transformers.Trainer`. Sets for evaluation have the same columns as `train_dataset`.

    Raises:
        ValueError: A model with more than two labels or that is not a classifier, an object that is not a data set, a
            data set without a column of labels 0 and 1, the configuration of another trainer, or options that do not
            fit.

    Source: Thorat and Caines 2025, arXiv:2508.00619; Yuan et al. 2023, LibAUC, KDD.
    """

    config_class = DXOConfig
    args: DXOConfig
    columns: Mapping[str, str] = dict.fromkeys(("input_ids", "attention_mask"), IDS)
    refused_arguments: Mapping[str, str] = {"model_init": NO_MODEL_INIT, "compute_loss_func": OWN_LOSS}
    refused_options: Mapping[str, str] = {
        "label_smoothing_factor": "DXO's losses compare scores and have no labels to smooth: leave it 0",
        "batch_eval_metrics": "ranking metrics are computed over all rows at once: set it to False",
    }
    averages_items = True

    def __init__(
        self,
        model: Any,
        args: DXOConfig | None = None,
        *,
        loss: str | ranking.RankingLoss | None = None,
        train_dataset: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        **kwargs: Any,
    ):
        args = self.configured(args, kwargs)
        if args.sampling_rate is not None:
            refuse_options(args, {"train_sampling_strategy": "sampling_rate makes the batches: set that to None"})
        self._prepare_model(model)
        if train_dataset is not None:
            train_dataset = numbered(train_dataset, "train_dataset")
        eval_sets = kwargs.get("eval_dataset")
        for name, dataset in eval_sets.items() if isinstance(eval_sets, dict) else [("eval_dataset", eval_sets)]:
            if isinstance(dataset, Dataset):  # others are checked batch by batch
                check_labels(dataset, name)
        self._more_metrics = compute_metrics
        super().__init__(model=model, args=args, train_dataset=train_dataset, compute_metrics=self._measure, **kwargs)
        rows = 0 if train_dataset is None else len(train_dataset)
        self.objective = ranking.Objective(ranking.get(loss or args.loss), rows).to(args.device)
        self.warm = ranking.Objective(ranking.BCE(), rows)
        self._epochs = SamplerEpochs()
        self.add_callback(self._epochs)

    @staticmethod
    def _prepare_model(model: Any) -> None:
        """Sets the problem type. Raises: ValueError for a model that is not a classifier of one or two labels."""
        inner = inner_of(model)
        if "labels" not in inspect.signature(inner.forward).parameters or not hasattr(inner, "config"):
            raise ValueError(NO_CLASSIFIER.format(type(inner).__name__))
        if model.config.num_labels not in (1, 2):
            raise ValueError(f"the model has {model.config.num_labels} labels: load it with num_labels=1 (or 2)")
        if model.config.num_labels == 1:
            model.config.problem_type = "multi_label_classification"

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """BCE in evaluation and the warm start, else the loss, over the scores of all ranks.

        Raises:
            ValueError: A batch has no labels or others than 0 and 1, or the model's logits are not one row per text.
        """
        inputs = dict(inputs)
        labels, index = inputs.pop("labels", None), inputs.pop(ROW, None)
        if labels is None or not bool(((labels == 0) | (labels == 1)).all()):
            raise ValueError(
                f"a batch has {', '.join(inputs)}, and labels {labels}: give 0 or 1 for every row, in a column named"
                f" {' or '.join(LABELS)}"
            )
        labels = labels.reshape(-1)
        outputs = model(**inputs)
        if outputs["logits"].ndim != 2:
            raise ValueError(NO_CLASSIFIER.format(type(inner_of(model)).__name__))
        logits = scores_of(outputs["logits"])
        if not model.training or self.state.global_step < self.warm_steps(self.state.max_steps):
            loss = self.warm(logits, labels)
        else:
            ranks = self.accelerator.num_processes
            rows = None if index is None else gathered(index, ranks)
            loss = self.objective(gathered(logits, ranks), gathered(labels, ranks), rows)
        return (loss, outputs) if return_outputs else loss

    def warm_steps(self, total: int) -> int:
        """The number of updates under BCE, out of `total`."""
        share = self.args.warm_start
        return math.ceil(share * total) if share < 1 else int(share)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As `Trainer`; after the warm start the learning rate is scaled by dxo_learning_rate / learning_rate.

        Raises:
            ValueError: The warm start takes all updates, or the schedule is not a function of the step.
        """
        is_new = self.lr_scheduler is None
        if 0 < num_training_steps <= self.warm_steps(num_training_steps):
            raise ValueError(
                f"warm_start is {self.args.warm_start}, and training has {num_training_steps} updates: the loss after"
                " it would never be used, choose a shorter one or loss='bce'"
            )
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if is_new and self.args.dxo_learning_rate is not None:
            if not isinstance(scheduler, LambdaLR):
                raise ValueError(
                    f"lr_scheduler_type is {self.args.lr_scheduler_type}: dxo_learning_rate needs one that is a"
                    " function of the step, such as linear"
                )
            scheduler.lr_lambdas = [self._staged(scale, num_training_steps) for scale in scheduler.lr_lambdas]
        return scheduler

    def _staged(self, scale: Callable[[int], float], total: int) -> Callable[[int], float]:
        warm, share = self.warm_steps(total), self.args.dxo_learning_rate / self.args.learning_rate
        return lambda step: scale(step) * (1 if step < warm else share)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.sampling_rate is None:
            return super()._get_train_sampler(dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._epochs.sampler = ranking.DualSampler(
            labels_of(dataset, "train_dataset"), self._train_batch_size, self.args.sampling_rate, seed
        )
        return self._epochs.sampler

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if ROW not in self._signature_columns:
            self._signature_columns.append(ROW)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As `Trainer`.

        Raises:
            ValueError: A data set has no column of labels.
        """
        if isinstance(eval_dataset, Dataset):
            check_labels(eval_dataset, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As `Trainer`; a column of labels that are all -1 or None counts as missing.

        Raises:
            ValueError: Other labels are not 0 or 1.
        """
        if isinstance(test_dataset, Dataset):
            test_dataset = without_unknown(test_dataset, "test_dataset")
        return super().get_test_dataloader(test_dataset)

    def _measure(self, prediction: EvalPrediction) -> dict[str, float]:
        predictions, labels = prediction.predictions, prediction.label_ids
        if not self.args.eval_do_concat_batches:
            predictions, labels = np.concatenate(predictions), np.concatenate(labels)
        scores = scores_of(torch.as_tensor(predictions)).double().numpy()
        labels, more_metrics = labels.reshape(-1), self._more_metrics
        more = more_metrics(prediction) if more_metrics else {}
        if len(set(labels.tolist())) < 2:
            warnings.warn("the data has one class only: ranking metrics are undefined and left out", stacklevel=2)
            return more
        return {**ranking_metrics(labels, scores, self.args.max_fpr, self.args.min_tpr), **more}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            save_file(self.objective.state_dict(), Path(output_dir) / STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        try:
            self.objective.load_state_dict(load_file(Path(checkpoint) / STATE))
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{checkpoint} does not have the state of {self.objective.loss} over {len(self.train_dataset)} rows:"
                " resume with the same loss and training set"
            ) from error

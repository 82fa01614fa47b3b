"""Self-distillation for (cross-lingual) extractive question answering, weighted by how right the teacher is.

    loss = CE + a T^2 KL(softmax(t / T) || softmax(s / T))          each the mean of start and end, over the rows

CE is the model's own loss; s are its logits, t the teacher's, both over all positions of a row. The weight a is the
teacher's mAP@k on the batch, the mean of start and end (`hf_xent.metrics.answers`):

    a = 1/2 sum over {start, end} of the mean over rows of 1 / rank of the first of the teacher's k likeliest positions
        in [gold - tolerance, gold + tolerance); 0 if none is

so that a teacher that is wrong is not listened to. The teacher is the model itself, without a gradient:

    teacher="current"    its current weights, in training mode: it differs by dropout alone
    teacher="epoch"      its weights when the epoch began, in evaluation mode, as in the authors' published code ("in
                         generations"; a copy of the weights is kept, and is part of checkpoints)

`weight` may be a number instead of "map", the same for all batches; with 0 there is no teacher, and the loss is CE. The
mean precision is that of a batch on one device: of 8 batches of one row that are accumulated, the loss is
mean(CE) + mean(a KL) with an a for every row, of one batch of 8 rows mean(CE) + mean(a) mean(KL). The two differ by the
covariance of a and KL over the rows. With a number the two are equal.

Evaluation is under CE alone; `AnswerMetrics` adds exact match, F1 and mAP@k. The authors train mBERT, fine-tuned on
English SQuAD before, on XQuAD: 3 epochs of 6 rows x 4 accumulated, windows of 384 tokens, T = 2, k = 10, tolerance 5.

Source: Carrino et al. 2023, arXiv:2309.17134, with the authors' code, github.com/ccasimiro88/self-distillation-gxlt-qa.
Data: windows with `start_positions` and `end_positions`, as `hf_xent.data.questions.windows` makes them, or
`hf_xent.data.crosslingual.CrossLingual`, which draws the languages of question and context anew every epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ..classes.spans import Logits, span_divergence
from ..hub import Carded, Tokenless
from ..metrics.answers import map_at_k
from ..models.anatomy import has_dropout
from ..options.ranges import is_number
from ..patching.calls import parameters_of
from ..patching.heads import inner_of
from .answer_metrics import AnswerMetrics
from .base import Method, Options
from .epoch_teacher import EpochTeacher
from .epochs import EpochCallback
from .refusals import OWN_LOSS, refuse_options

__all__ = ["AnswerMetrics", "SelfDistilQAConfig", "SelfDistilQATrainer"]
POSITIONS = ("start_positions", "end_positions")
NO_DROPOUT = (
    "the model has no dropout, so that with teacher='current' teacher and student are equal and the divergence is 0:"
    " load it with dropout, or choose teacher='epoch' or weight=0"
)


@dataclass
class SelfDistilQAConfig(Options, Tokenless, TrainingArguments):
    """`transformers.TrainingArguments` and the options of self-distillation.

    Raises:
        ValueError: A field has a value out of its range or of another type, or would have no effect.
    """

    ranges: ClassVar[dict[str, str]] = {"temperature": "(0, inf)", "top_k": "[1, inf)", "tolerance": "[1, inf)"}
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"teacher": ("current", "epoch")}

    weight: str = field(  # or a number; text on the command line
        default="map",
        metadata={
            "help": "Weight of the divergence: 'map' (mAP@k of the teacher on the batch), or a number of at least 0;"
            " 0 is plain cross-entropy."
        },
    )
    teacher: str = field(
        default="current",
        metadata={
            "help": "'current' (the current weights with other dropout) or 'epoch' (the weights when the epoch began,"
            " without dropout)."
        },
    )
    temperature: float = field(default=2.0, metadata={"help": "T of the divergence, which is multiplied by T^2."})
    top_k: int = field(
        default=10, metadata={"help": "k of mAP@k: how many of the teacher's likeliest positions count."}
    )
    tolerance: int = field(
        default=5, metadata={"help": "Positions from this many below the true one to one fewer above it are hits."}
    )

    def __post_init__(self) -> None:
        if is_number(self.weight, "(-inf, inf)"):
            self.weight = str(self.weight)
        super().__post_init__()
        if self.weight != "map":
            try:
                value = float(self.weight)
            except ValueError:
                value = -1.0
            if not is_number(value, "[0, inf)"):
                raise ValueError(f"weight is {self.weight!r}: choose 'map' or a number in [0, inf)")
            reason = f"weight is {self.weight}, which does not read it: leave it, or choose weight='map'"
            refuse_options(self, dict.fromkeys(("top_k", "tolerance"), reason))
        if self.fixed_weight == 0:
            reason = "weight is 0, so there is no teacher: leave it, or choose another weight"
            refuse_options(self, dict.fromkeys(("temperature", "teacher"), reason))

    @property
    def fixed_weight(self) -> float | None:
        """The weight as a number; None if it is mAP@k."""
        return None if self.weight == "map" else float(self.weight)


class SelfDistilQATrainer(Method, Carded, Trainer):
    """Fine-tunes any `AutoModelForQuestionAnswering` under CE and self-distillation; see the module's docstring.

    Logged beside the loss, means over the rows since the last log: `ce`, `kl` (with its factor T^2) and `weight` (a).

    Args:
        model: A model with `start_logits` and `end_logits`.
        args: The configuration; `SelfDistilQAConfig(output_dir="out")` if it is left out.
        **kwargs: As for `transformers.Trainer`; `compute_metrics=AnswerMetrics(rows, windows)` for exact match and F1.

    Raises:
        ValueError: A model that does not answer questions, or without dropout where the teacher needs it, the
            configuration of another trainer, or options that do not fit; in training, a batch without positions.

    Source: Carrino et al. 2023, arXiv:2309.17134.
    """

    config_class = SelfDistilQAConfig
    args: SelfDistilQAConfig
    means: tuple[str, ...] = ("ce", "kl", "weight")
    averages_items = True
    refused_arguments: Mapping[str, str] = {
        "model_init": "the model's dropout is looked at when the trainer is made: pass model instead",
        "compute_loss_func": OWN_LOSS,
    }
    refused_options: Mapping[str, str] = {
        "label_smoothing_factor": "the cross-entropy is the model's own, which is not smoothed: leave it 0"
    }
    _differs = False  # whether teacher and student are known to differ

    def __init__(self, model: Any, args: SelfDistilQAConfig | None = None, **kwargs: Any):
        args = self.configured(args, kwargs)
        kind: Any = type(inner_of(model))
        if not set(POSITIONS) <= set(parameters_of(kind)):
            raise ValueError(
                f"model is a {kind.__name__}, which does not take start_positions: use AutoModelForQuestionAnswering"
            )
        if args.fixed_weight != 0 and args.teacher == "current" and not has_dropout(model):
            raise ValueError(NO_DROPOUT)
        super().__init__(model=model, args=args, **kwargs)
        self._teacher = EpochTeacher()
        if args.teacher == "epoch" and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("teacher is 'epoch', which is a copy of the whole model: train without FSDP and DeepSpeed")
        self.add_callback(EpochCallback(self.begin_epoch))

    def begin_epoch(self, epoch: int, resumed: bool) -> None:
        """Renews the epoch's teacher, and lets a data set that draws its rows draw those of the epoch.

        Raises:
            ValueError: Training resumes within an epoch from a checkpoint that has no teacher.
        """
        if hasattr(self.train_dataset, "set_epoch"):
            self.train_dataset.set_epoch(epoch)
        if self.args.teacher == "epoch" and not resumed:
            self._teacher.renew(self.accelerator.unwrap_model(self.model))
        elif self.args.teacher == "epoch" and self._teacher.model is None:
            raise ValueError("the checkpoint has no teacher of its epoch: resume one that was trained with 'epoch'")

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """CE in evaluation, CE and the weighted divergence in training.

        Raises:
            ValueError: A batch has no positions, the model has other outputs, or its dropout has no effect.
        """
        if missing := [name for name in POSITIONS if inputs.get(name) is None]:
            raise ValueError(f"a batch has no {' and no '.join(missing)}: make it by hf_xent.data.questions.windows")
        is_distilled = model.training and self.args.fixed_weight != 0
        teacher = self._teacher_logits(model, inputs) if is_distilled else None
        outputs = model(**inputs)
        loss, rows = outputs["loss"].mean(), len(inputs[POSITIONS[0]])
        if model.training:
            self._note("ce", loss.detach() * rows, rows)
        if teacher is not None:
            student = _span_logits(outputs)
            self._check_teacher(student, teacher)
            divergence = span_divergence(student, teacher, self.args.temperature)
            weight = self.weight_of(teacher, (inputs[POSITIONS[0]], inputs[POSITIONS[1]]))
            self._note("kl", divergence.detach() * rows, rows)
            self._note("weight", weight * rows, rows)
            loss = loss + weight * divergence
        return (loss, outputs) if return_outputs else loss

    def weight_of(self, teacher: Logits, positions: tuple[Tensor, Tensor]) -> Tensor | float:
        """The weight a of a batch.

        Args:
            teacher: The teacher's logits of start and end, [N, T] each.
            positions: The true start and end of every row, [N] each.

        Returns:
            The number that the options give, or mAP@k, the mean of start and end.
        """
        if self.args.fixed_weight is not None:
            return self.args.fixed_weight
        k, tolerance = self.args.top_k, self.args.tolerance
        found = [map_at_k(x, y.reshape(-1), k, tolerance) for x, y in zip(teacher, positions, strict=True)]
        return (found[0] + found[1]) / 2

    def _teacher_logits(self, model: nn.Module, inputs: Mapping[str, Any]) -> Logits:
        """The teacher's logits of start and end; its pass does not see the positions."""
        teacher = model if self.args.teacher == "current" else self._teacher.model
        with torch.no_grad():
            return _span_logits(teacher(**{name: x for name, x in inputs.items() if name not in POSITIONS}))

    def _check_teacher(self, student: Logits, teacher: Logits) -> None:
        """Raises: ValueError if the first pass shows that dropout, though there is some, has no effect."""
        if self._differs or self.args.teacher == "epoch":
            return
        if all(torch.equal(s, t) for s, t in zip(student, teacher, strict=True)):
            raise ValueError(NO_DROPOUT)
        self._differs = True

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self._teacher.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.teacher == "epoch":
            self._teacher.load(checkpoint, self.accelerator.unwrap_model(self.model))


def _span_logits(outputs: Any) -> Logits:
    """Raises: ValueError if a model has other outputs, as XLNet's and XLM's heads with a beam."""
    try:
        return outputs["start_logits"], outputs["end_logits"]
    except KeyError:
        raise ValueError(
            f"the model's outputs are {', '.join(outputs)}, without start_logits: choose a model with a softmax over"
            " starts and one over ends"
        ) from None

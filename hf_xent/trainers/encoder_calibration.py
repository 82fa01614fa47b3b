"""Adversarial calibration of a frozen encoder: a small head after it is trained on adversarial examples alone.

    ce        -log softmax_c(scale cos(h(f(x')), t_c))[y]
    l2        |h(f(x')) - f(x)|^2
    infonce   -log softmax_j(scale cos(h(f(x'_i)), f(x_j)))[i]        j over the rows of the batch
    loss = objective + drift_weight |h(f(x)) - f(x)|^2

f is the encoder and t_c the centers of the classes, both frozen; h is the head. x' is found anew in every step by
gradient ascent on the cross-entropy of the classes as the head sees them, from a random point of the ball around x:
an attack that knows the head. The encoder is in evaluation mode throughout and gets no gradient.

From the paper's abstract: the frozen encoder and centers, a head for each modality that is trained on adversarial
examples alone, the names of the three objectives, and that there is a regularization. Choices of this library, for want
of the paper's code: the form of the head (`hf_xent.models.projection`), features and h(f) of unit length in all terms,
the form of the regularization and its weight, the attack, and `scale`, which is the encoder's own (`ZeroShot.scale`).

One run trains the head of one modality, that of the columns it gets; for another modality make another `ZeroShot` of
the same encoder. Without `labels`, which 'l2' and 'infonce' do not read, the ascent leaves the class that the encoder
predicts. 'ce' and 'l2' are means over the rows of a step, so that 1 x 8 rows are 8 x 1; 'infonce' is a loss of the
batch, averaged over accumulated batches and processes, whose negatives are the other rows of the same batch.

Source: Liao et al. 2025, arXiv:2505.11895.
Data: the inputs of one tower, or of the encoder; `labels`, the ids of rows of the centers, for 'ce'.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, set_seed

from .. import robust
from ..classes.heads import inputs_of
from ..hub import Carded, Tokenless
from ..models.contexts import eval_mode
from ..models.embeddings import TOWERS
from ..models.projection import ProjectionConfig, ProjectionHead
from ..patching.heads import inner_of
from ..robust.ascent import ascend
from ..robust.ball import NORMS, Ball
from ..robust.base import generators
from ..robust.inputs import Target, ball_of, target_of
from .base import Method, Options
from .encoder_setup import OBJECTIVES, check_start, objective_rows, zero_shot_of
from .refusals import OWN_LOSS
from .rows import IDS

ASCENT = "ascent"
SIZES = 2.5
"""The sizes of all steps of the ascent together, in radii: 10 steps of a quarter."""


@dataclass
class EncoderCalibrationConfig(Options, Tokenless, TrainingArguments):
    """`transformers.TrainingArguments`, the objective, and the attack of the training.

    Raises:
        ValueError: A field has a value out of its range or of another type.
    """

    objective: str = field(default="ce", metadata={"help": "'ce', 'l2' or 'infonce'; the last two read no labels."})
    drift_weight: float = field(
        default=1.0, metadata={"help": "lambda, the weight of the squared change of clean features by the head."}
    )
    epsilon: float = field(
        default=4 / 255, metadata={"help": "The radius of the attack, in the units of hf_xent.robust.inputs."}
    )
    norm: str = field(default="inf", metadata={"help": "The norm of the radius, 'inf' or '2'."})
    steps: int = field(default=10, metadata={"help": "The steps of the attack on a row."})
    attack: str = field(
        default=ASCENT,
        metadata={
            "help": "'ascent' takes all steps on every row; a name of hf_xent.robust.ATTACKS, with options if any,"
            " leaves a row once its class has changed."
        },
    )
    head_size: int | None = field(
        default=None,
        metadata={"help": "The inner width of the head that the trainer makes; half of that of features for None."},
    )

    choices = {"objective": OBJECTIVES, "norm": NORMS}  # noqa: RUF012
    ranges = {  # noqa: RUF012
        "drift_weight": "[0, inf)", "epsilon": "(0, inf)", "steps": "[1, inf)", "head_size": "[1, inf)",
    }  # fmt: skip


class EncoderCalibrationTrainer(Method, Carded, Trainer):
    """Trains the head of a zero-shot classifier on adversarial examples; see the module's docstring.

    The model that is trained, saved and published is the head (`trainer.model`), with the centers beside it;
    `ZeroShot.from_pretrained(folder, encoder)` puts them together. Logged and evaluated: `accuracy` of clean rows,
    `adversarial_accuracy` under the attack of the training, which both need labels, and `drift`, the squared change of
    clean features. The attack of an evaluation starts at the same points each time. Robustness is measured by
    `hf_xent.robust.attack`, with more steps and other attacks than those of the training. Predictions are clean logits.

    Args:
        model: A `hf_xent.models.zero_shot.ZeroShot`. If it has no head, it gets one that is the identity at first.
        args: The configuration; `EncoderCalibrationConfig(output_dir="out")` if it is left out.
        **kwargs: As for `transformers.Trainer`. For images, `processing_class` is the image processor, whose mean and
            standard deviation give epsilon its unit.

    Raises:
        ValueError: Another model than a `ZeroShot`, or one whose head is no `ProjectionHead`; images without a
            processor; a training set without labels under 'ce'; 'infonce' with batches of one row; a `head_size` for
            a head that is there; FSDP or DeepSpeed. In training, a batch without labels under 'ce', labels outside of
            the centers, or inputs of two towers.

    Source: Liao et al. 2025, arXiv:2505.11895.
    """

    config_class = EncoderCalibrationConfig
    args: EncoderCalibrationConfig
    columns: Mapping[str, str] = dict.fromkeys(("input_ids", "attention_mask"), IDS)
    means = ("accuracy", "adversarial_accuracy", "drift")
    refused_arguments: Mapping[str, str] = {
        "model_init": "the encoder is frozen and the head is made once: pass model instead",
        "compute_loss_func": OWN_LOSS,
    }
    refused_options: Mapping[str, str] = {
        "label_smoothing_factor": "the objectives are those of the method: leave it 0",
    }
    _signature_columns: Any

    def __init__(self, model: Any, args: EncoderCalibrationConfig | None = None, **kwargs: Any):
        args = self.configured(args, kwargs)
        self.zero_shot = zero_shot_of(model)
        check_start(args, self.zero_shot, kwargs)
        self._attack = None if args.attack == ASCENT else robust.get(args.attack)
        set_seed(args.seed)  # as the stock trainer does, but before the head is drawn
        if self.zero_shot.head is None:
            config = ProjectionConfig(self.zero_shot.centers.shape[1], args.head_size)
            self.zero_shot.head = ProjectionHead(config)
        head: Any = self.zero_shot.head
        head.config.name_or_path = getattr(self.zero_shot.config, "name_or_path", "")  # the base model of its card
        self.averages_items = args.objective == "infonce"  # training_step then divides by the accumulated batches
        super().__init__(model=self.zero_shot.head, args=args, **kwargs)
        self.model_accepts_loss_kwargs = not self.averages_items  # the rows of a step are counted for us
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "the attack reads the weights of the head outside of its forward pass, where FSDP and DeepSpeed keep"
                " parts of them: train the head, which is small, without them"
            )
        self.zero_shot.to(self.args.device)

    @property
    def card_facts(self) -> Mapping[str, str]:
        """The encoder, its classes, and how much was trained."""
        zero_shot, head = self.zero_shot, self.zero_shot.head
        assert head is not None
        return {
            "Frozen encoder": type(inner_of(zero_shot.encoder)).__name__,
            "Classes": f"{len(zero_shot.centers)} centers, cosines times {zero_shot.scale:.4g}",
            "Trained": f"{sum(p.numel() for p in head.parameters()):,} parameters, {zero_shot.share():.2%} of all",
        }

    def _set_signature_columns_if_needed(self) -> None:
        """The inputs of the encoder instead of the head's."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            own: Any = self._signature_columns
            reads = inspect.signature(inner_of(self.zero_shot.encoder).forward).parameters
            self._signature_columns = list(dict.fromkeys([*reads, "labels", *own]))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The number of rows in the batches of a step; None for the loss of a batch."""
        if self.averages_items or not batch_samples:
            return None
        return self._counted_over_processes(sum(map(_rows, batch_samples)), device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch: the attack, one pass of the encoder over what it found, and one of the head.

        Raises:
            ValueError: As the class says.
        """
        with eval_mode(self.zero_shot):
            target, given = self._target(inputs)
            x = target.center()
            clean, logits = self._read(target, x)
            if not given:
                target.labels = self.zero_shot.classify(clean).argmax(-1)
            ball = ball_of(target, self.args.epsilon, self.args.norm, self.processing_class)
            attacked, attacked_logits = self._read(target, self._search(target, ball))
        moved, kept = F.normalize(model(torch.cat([attacked, clean])), dim=-1).chunk(2)
        rows = objective_rows(self.args.objective, moved, clean, target.labels, self.zero_shot)
        drift = (kept - clean).square().sum(-1)
        self._note("drift", drift.detach().sum(), len(drift))
        if given:
            for name, found in (("accuracy", logits), ("adversarial_accuracy", attacked_logits)):
                self._note(name, (found.argmax(-1) == target.labels).sum(), len(found))
        rows = rows + self.args.drift_weight * drift
        loss = rows.mean() if num_items_in_batch is None else rows.sum() / num_items_in_batch * self._averaged_by
        return (loss, {"logits": logits}) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """The loss, the logits of clean inputs, and the labels if there are any."""
        inputs = self._prepare_inputs(inputs)
        with self._step(training=False), torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, outputs["logits"], inputs.get("labels"))

    def _target(self, inputs: Mapping[str, Any]) -> tuple[Target, bool]:
        """What is attacked, and whether it has labels; without them, they are those of class 0."""
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        towers = [name for name, method in TOWERS.items() if name in inputs and hasattr(self.zero_shot.encoder, method)]
        if len(towers) > 1:
            raise ValueError(f"a batch has {' and '.join(towers)}: one run is of one modality, so give one of them")
        if labels is None and self.args.objective == "ce":
            raise ValueError(f"a batch has {', '.join(inputs)} but no labels, which 'ce' needs: give them, or use 'l2'")
        target = target_of(self.zero_shot, inputs, torch.empty(0))
        count, classes = len(inputs[target.name]), len(self.zero_shot.centers)
        if labels is None:
            target.labels = torch.zeros(count, dtype=torch.long, device=self.args.device)
            return target, False
        if labels.shape != (count,) or labels.is_floating_point():
            raise ValueError(f"labels are {labels.dtype} of the shape {tuple(labels.shape)}: give one id a row")
        if labels.min() < 0 or labels.max() >= classes:
            low, high = int(labels.min()), int(labels.max())
            raise ValueError(f"labels are {low} to {high}, but there are {classes} centers: give ids of their rows")
        target.labels = labels
        return target, True

    def _read(self, target: Target, x: Tensor) -> tuple[Tensor, Tensor]:
        """The features that the head sees for inputs x [B, ...], and the logits behind it, without a gradient."""
        assert self.zero_shot.head is not None
        with inputs_of(self.zero_shot.head) as seen, torch.no_grad():
            logits = target.logits(x, torch.arange(len(x), device=x.device))
        return seen[-1], logits

    @torch.enable_grad()  # also in an evaluation
    def _search(self, target: Target, ball: Ball) -> Tensor:
        """The adversarial inputs [B, ...]; each row's random numbers are its own, new in every step of the training."""
        seed = self.args.seed + (0 if self._in_training is False else 1 + self.state.global_step)
        x, steps = target.center(), self.args.steps
        if self._attack is not None:
            return self._attack.find(target, ball, steps, seed).x

        def objective(step: int, x: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            return F.cross_entropy(target.logits(x, rows), target.labels[rows], reduction="none"), None

        return ascend(objective, x, ball, [SIZES * ball.radius / steps] * steps, ball.start(x, generators(x, seed))).x

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.zero_shot.save_centers(output_dir or self.args.output_dir)


def _rows(batch: Mapping[str, Any]) -> int:
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))

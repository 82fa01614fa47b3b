"""Distillation: a student learns the distribution of a teacher over all tokens, and no logits of either are made.

    loss_t = (1 - w) T^2 D(p_t, q_t) + w CE(label_t, q_t)       mean over the labels of a step

p_t and q_t are the softmaxes of teacher and student at temperature T (in the cross-entropy, of weight w, at 1), D is a
divergence of the registry: KL in both directions, skewed or not, Jensen-Shannon, total variation. Labels say which
positions count, and what the cross-entropy is of. Without `on_policy` the texts are those of the data set (completions
that the teacher has written make it sequence-level distillation). A share of `on_policy` of the batches has completions
that the student samples itself, anew at every step, and learns what the teacher thinks of them; no gradient flows
through the sampling.

Teachers are of any hidden size: models, caches, servers, several with weights (`hf_xent.teachers`). A model that is a
teacher is neither trained nor saved. Every process has a copy of it, or, under ZeRO-3, its part, as of the student.

Source: Hinton, Vinyals, Dean 2015, arXiv:1503.02531; on policy, Agarwal et al. 2024, arXiv:2306.13649; sequence-level
distillation, Kim, Rush 2016, arXiv:1606.07947.
Data: as for `StreamedSFTTrainer`: text, or prompts and completions, or chats, and weights of their labels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import losses
from ..losses.distillation import Distillation
from ..ops import Head, Stats
from ..options.ranges import is_number
from ..patching import inner_of, lazily, patch_state
from ..teachers.base import Teacher
from ..teachers.loading import load
from ..teachers.local import LocalTeacher
from ..teachers.placing import described, parts_of, place, refuse_known_texts
from ..teachers.unadapted import UnadaptedTeacher
from .batches import lazy, targets
from .on_policy import Draw, prompts_of, sampled, whole
from .refusals import refuse_options
from .sft import StreamedSFTConfig, StreamedSFTTrainer
from .weights import TOKENS

BASE = "base"
"""The teacher that is the student without its adapters."""
NOT_OF_MODEL = ("labels", "shift_labels", TOKENS)
"""What a batch has beside the model's inputs."""


@dataclass
class DistillationConfig(StreamedSFTConfig):
    """`trl.SFTConfig`, the divergence from the teacher, what is sampled, and what evaluations measure.

    Raises:
        ValueError: A field has a value out of its range or of another type, or would have no effect.
    """

    ranges: ClassVar[dict[str, str]] = {
        "temperature": "(0, inf)",
        "sampling_temperature": "(0, inf)",
        "ce_weight": "[0, 1]",
        "on_policy": "[0, 1]",
        "max_new_tokens": "[1, inf)",
    }

    objective: str = field(
        default="forward_kl",
        metadata={
            "help": "Registry name of the divergence, with options if any: 'jsd:beta=0.5'. `hf-xent losses` lists them."
        },
    )
    temperature: float = field(
        default=1.0, metadata={"help": "T of both softmaxes in the divergence, which is multiplied by T^2."}
    )
    ce_weight: float = field(
        default=0.0, metadata={"help": "w, the weight of the cross-entropy of the labels; 1 - w is the divergence's."}
    )
    teacher_weights: list[float] | None = field(
        default=None, metadata={"help": "Weights of several teachers, divided by their sum; default: all alike."}
    )
    on_policy: float = field(
        default=0.0, metadata={"help": "Share of the batches whose completions the student samples, lambda of GKD."}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "The maximum length of a sampled completion, tokens."})
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the softmax from which completions are sampled."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.on_policy:
            why = "on_policy is 0, so nothing is sampled: set on_policy, or leave it out"
            refuse_options(self, dict.fromkeys(("max_new_tokens", "sampling_temperature"), why))
        elif self.packing:
            raise ValueError(
                f"on_policy is {self.on_policy}, but packing is True, which cuts prompts from their completions: set it"
                " to False"
            )
        if self.teacher_weights is not None and not all(is_number(w, "[0, inf)") for w in self.teacher_weights):
            raise ValueError(f"teacher_weights is {self.teacher_weights!r}: give numbers of at least 0")
        objective_of(self)


class DistillationTrainer(StreamedSFTTrainer):
    """`trl.SFTTrainer` with a divergence from a teacher in place of cross-entropy; see the module's docstring.

        loss = sum over all labels of a step of w_t loss_t / sum of w_t          w_t = 1 without weights

    Evaluations compute the same loss, on the texts of their data set. Logged beside what `StreamedSFTTrainer` logs,
    means over labels: `divergence`, D(p, q) at temperature T in nats per token, without the factors T^2 and 1 - w; and
    `perplexity` of the labels; `teacher_coverage`, the share of labels about which a teacher with another tokenizer, or
    from a cache, has an opinion. On policy also `on_policy_share`, the share of batches that were sampled, and
    `generated_length`, tokens of a completion, an end token included.

    Args:
        model: The student, a causal LM, or its Hub id or path. It is patched.
        teacher: A teacher of `hf_xent.teachers`; a model, or its Hub id or path; the folder of a cache; the http(s) URL
            of a server; 'base' for the student without its adapters (of PEFT); or a list of others. A model is moved to
            the student's device, and partitioned where ZeRO-3 partitions the student.
        args: The configuration; `DistillationConfig(output_dir="out")` if it is left out.
        teacher_weights: One number for each of several teachers; they take precedence over `args.teacher_weights`.
        **kwargs: As for `trl.SFTTrainer`, but without `compute_loss_func`.

    Raises:
        ValueError: An unknown objective, the configuration of another trainer, options without effect, a teacher that
            cannot be loaded; in training, a teacher whose vocabulary does not fit, or, on policy, batches with weights
            or images.
    """

    config_class: type = DistillationConfig
    args: DistillationConfig
    objective: Distillation
    means = ("divergence", "nll", "teacher_coverage", "on_policy_share", "generated_length")
    refused_options: Mapping[str, str] = {
        "loss": "the loss is a divergence from the teacher: choose objective",
        "tail": "divergences have exact gradients only: leave it 0",
    }
    _name = "Distillation"
    _tag_names = ["trl", "distillation", "hf_xent"]  # noqa: RUF012  TRL's attribute

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher: Teacher | nn.Module | str | Sequence[Any] | None = None,
        args: DistillationConfig | None = None,
        *,
        teacher_weights: Sequence[float] | None = None,
        **kwargs: Any,
    ):
        args = self.configured(args, kwargs)
        weights = args.teacher_weights if teacher_weights is None else teacher_weights
        super().__init__(model, args, **kwargs)
        if teacher is None:
            raise ValueError("teacher is None: pass a model or its name, a cache's folder, a server's URL or 'base'")
        self.objective = objective_of(args)
        if isinstance(teacher, str) and teacher == BASE:
            self.teacher: Teacher = UnadaptedTeacher(self.model)
        else:
            self.teacher = load(teacher, weights=weights, tokenizer=self._tokenizer)
        refuse_known_texts(self.teacher, args.on_policy)
        local = [part for part in parts_of(self.teacher) if isinstance(part, LocalTeacher)]
        self._own = [part for part in local if inner_of(part.model) is inner_of(self.model)]  # the student itself
        for part in local:
            if part not in self._own:
                place(part, self.accelerator)

    @property
    def card_facts(self) -> Mapping[str, str]:
        """The teacher, for the model's card."""
        return {"Teacher": described(self.teacher)}

    @property
    def _virtual_tokens(self) -> int:
        """None that count: the teacher has no positions for those of prompt tuning."""
        return 0

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """As `Trainer`; on policy, batches are replaced before their labels are counted."""
        if self.args.on_policy:
            epoch_iterator = map(self._given_or_sampled, epoch_iterator, itertools.count())
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _given_or_sampled(self, batch: dict[str, Any], number: int) -> dict[str, Any]:
        """A batch of a step, or the student's completions of its prompts."""
        args, draw = self.args, Draw(self.args.seed, self.state.global_step, number)
        replaces = draw.replaces(args.on_policy)
        with self._step(training=True):
            self._note("on_policy_share", float(replaces))
            if not replaces:
                prompts_of(batch)  # also refuses what samples cannot have
                return batch
            with whole(self.model_wrapped, self.accelerator) as model:
                new = sampled(
                    model,
                    batch,
                    tokens=args.max_new_tokens,
                    temperature=args.sampling_temperature,
                    seed=draw.seed_of(args.process_index),
                    pad=self._tokenizer.pad_token_id or 0,
                )
            self._note("generated_length", (new["labels"] != -100).sum(), len(new["labels"]))
        return new

    def _scored(self, model: Any, inputs: dict[str, Any], items: Any) -> tuple[Any, Any]:
        """The distillation loss of a batch, divided by `items` if given, and the student's output."""
        labels, weights = targets(inputs), self._shifted_weights(inputs)
        if weights is not None:
            labels = torch.where(weights == 0, -100, labels)
        for part in self._own:
            part.model = self.model  # FSDP has wrapped it since
        given = self.teacher.targets({name: x for name, x in inputs.items() if name != TOKENS})
        if (mask := getattr(given, "mask", None)) is not None:  # it has no opinion about some positions
            valid = labels.to(mask.device) != -100
            self._note("teacher_coverage", (mask & valid).sum(), valid.sum())
        state = patch_state(self.model)
        with lazily(model):
            output = model(**{name: x for name, x in inputs.items() if name not in NOT_OF_MODEL})

        def compute(hidden: Tensor, head: Head) -> tuple[Tensor, Stats]:
            return self.objective.compute(
                hidden,
                head,
                labels.to(hidden.device),
                num_items=items,
                token_weight=None if weights is None else weights.to(hidden.device),
                teacher=given,
                observe=state.observe,
                **state.options,
            )

        loss, stats = lazy(output.logits, labels.shape[1], "distillation").with_head(compute)
        state.record(stats)
        self._note_means(stats)
        return loss, output

    @staticmethod
    def _shifted_weights(inputs: Mapping[str, Any]) -> Tensor | None:
        """The weight of the token that each position has to predict [B, T]; None without weights."""
        weights = inputs.get(TOKENS)
        if weights is None or inputs.get("labels") is None:
            return weights
        return nn.functional.pad(weights, (0, 1))[..., 1:]

    def _note_means(self, stats: Stats) -> None:
        loss, tokens, nll = self.objective, stats.mask.sum(), stats.nll.sum()
        self._note("nll", nll, tokens)
        if loss.ce_weight < 1:  # otherwise the loss says nothing of the divergence
            divergence = (stats.loss.sum() - loss.ce_weight * nll) / (1 - loss.ce_weight)
            self._note("divergence", divergence / loss.temperature**2, tokens)

    def _means(self, training: bool) -> dict[str, float]:
        """Means over labels and batches, with the perplexity in place of the mean log-probability."""
        means = super()._means(training)
        nll = means.pop("nll", None)
        return means if nll is None else {"perplexity": math.exp(min(nll, 700.0)), **means}


def objective_of(args: DistillationConfig) -> Distillation:
    """The loss that a configuration names.

    Raises:
        ValueError: It is unknown, compares with no teacher, or an option is given twice.
    """
    given = {name: getattr(args, name) for name in ("temperature", "ce_weight")}
    changed = {name: x for name, x in given.items() if x != getattr(type(args), name)}
    objective = losses.get(args.objective, **changed)
    if not isinstance(objective, Distillation):
        known = [name for name, loss in losses.LOSSES.items() if issubclass(loss, Distillation)]
        raise ValueError(f"objective is {args.objective!r}, which has no teacher: choose one of {', '.join(known)}")
    return objective

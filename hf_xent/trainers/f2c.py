"""Flip-flop consistency (F2C): a model is trained on unlabeled items in K formats towards the answer of most formats.

Each step scores every answer in every format (mean log-probability l_kc of its tokens, evaluation mode, no gradient).
Format k answers y_k = argmax_c l_kc; a label that more than half of the formats answer is the consensus y*. An item
without a consensus contributes nothing. Then, over the K sequences of prompt and consensus answer,

    loss = (lambda CCE + beta J + w A) / C        CCE = mean_k -l_k,y*

    M        the softmax mixture mean_k P_k(t) over some formats, at the t-th token of the answer
    J        agreement, 1/2 [KL(M || P_k) + KL(P_k || M)] over the teachers, gradient into M too (the authors' "JSD")
    A        alignment, KL(sg[M] || P_s) of the teachers' mixture and every student
    teachers those k of the min(top_k, M - 1) largest margins l_k,y* - max_c l_kc among the M formats that answer y*;
             students are all other formats. With fewer than two teachers the loss is CCE alone; if all formats agree
             and the median margin reaches `threshold`, J is over all of them and A is left out.
    w        w_min + (w_max - w_min) sigmoid((mean teacher l - mean student l) / weight_temperature), a constant

Only answer tokens go through the head. The loss of a step is the mean over its items, skipped ones included: the
authors' code sums over the accumulated items instead, which their optimizer hides and their gradient clipping does not.
`method="cce"` trains CCE alone, `method="swarm"` the authors' other baseline, KL(sg[M] || P_k) over all formats for
every answer, without a vote. The median of an even number of margins is the mean of the two in the middle.

A majority can be wrong: evaluation reports F1, label marginals and the constant predictor beside the agreement.

Source: Hejabi et al. 2025, Flip-Flop Consistency, arXiv:2510.14242; written from the description alone.
Data: rows of `hf_xent.data.PromptFormats.build`, all with the same K and C. `gold`, the number of the right answer, is
read in evaluation only; None and -1 stand for unknown, and rows without it are left out of the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ..generation.choices import answer_means
from ..hub import Carded, Tokenless
from ..metrics.consistency import consistency
from ..models.contexts import eval_mode
from ..patching import patch
from ..system import renamed
from .base import Method, Options
from .consensus import Split, agreement, alignment, consensus, split
from .f2c_items import COLUMNS, ROW, ItemCollator, check_gold, prefix_logits
from .refusals import NO_MODEL_INIT, OWN_LOSS, refuse_encoder_decoder


@dataclass
class F2CConfig(Options, Tokenless, TrainingArguments):
    """`transformers.TrainingArguments` and the options of F2C; the defaults are the authors' for RTE, in all but K.

    Raises:
        ValueError: A field has a value out of its range or of another type, or is set where `method` does not read it.
    """

    ranges: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("cce_weight", "agreement_weight", "alignment_min", "alignment_max"), "[0, inf)"),
        "weight_temperature": "(0, inf)",
        "threshold": "[-inf, inf]",
        "top_k": "[2, inf)",
    }
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"method": ("f2c", "cce", "swarm")}
    read_by: ClassVar[dict[str, tuple[str, ...]]] = {
        "cce_weight": ("f2c", "cce"),
        **dict.fromkeys(
            ("agreement_weight", "alignment_min", "alignment_max", "weight_temperature", "threshold", "top_k",
             "group_answers"),
            ("f2c",),
        ),
    }  # fmt: skip

    method: str = field(default="f2c", metadata={"help": "'f2c', or a baseline: 'cce' or 'swarm'."})
    cce_weight: float = field(default=0.4, metadata={"help": "lambda, of the consensus cross-entropy."})
    agreement_weight: float = field(default=0.35, metadata={"help": "beta, of the teachers' agreement."})
    alignment_min: float = field(default=0.05, metadata={"help": "w_min, the least weight of the alignment."})
    alignment_max: float = field(default=0.35, metadata={"help": "w_max, its greatest weight."})
    weight_temperature: float = field(
        default=2.2, metadata={"help": "Temperature of the sigmoid between the least and the greatest weight."}
    )
    threshold: float = field(
        default=1.4, metadata={"help": "Median margin (nats) above which all formats are teachers."}
    )
    top_k: int = field(default=3, metadata={"help": "The largest number of teachers."})
    group_answers: bool = field(
        default=False, metadata={"help": "Compare only formats whose answer has the same tokens ('Yes' with 'Yes')."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "False, since rows have the prompts and answers of all formats."}
    )
    label_names: list[str] | None = field(default_factory=lambda: ["gold"], metadata={"help": "True labels, if any."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alignment_min > self.alignment_max:
            raise ValueError(
                f"alignment_min is {self.alignment_min} and alignment_max {self.alignment_max}: choose alignment_min <="
                " alignment_max"
            )


class F2CTrainer(Method, Carded, Trainer):
    """Fine-tunes a causal LM towards giving one answer in all formats, without labels; see the module's docstring.

        loss = (lambda CCE + beta J + w A) / C          the mean over a batch's items

    Logged: `consensus` (the share of items that had one), `loss_cce`, `loss_agreement`, `loss_alignment` (means over
    items that had one, before their weights). Evaluation gives the same loss without dropout, and, where rows have
    `gold`, the fields of `hf_xent.metrics.consistency.Consistency`.

    Args:
        model: A causal LM. It is patched.
        args: The configuration; `F2CConfig(output_dir="out")` if it is left out.
        **kwargs: As for `transformers.Trainer`. Rows of the data sets have the columns `prompts` and `answers`, and
            `gold` if the right answer is known, as `hf_xent.data.PromptFormats.build` makes them. A
            `processing_class` provides the padding token.

    Raises:
        ValueError: Options that do not fit, the configuration of another trainer, a model that cannot be patched, an
            encoder and decoder, or compilation; in training, rows without prompts and answers.

    Source: Hejabi et al. 2025, arXiv:2510.14242.
    """

    config_class = F2CConfig
    args: F2CConfig
    means = ("consensus", "loss_cce", "loss_agreement", "loss_alignment")
    refused_arguments: Mapping[str, str] = {"model_init": NO_MODEL_INIT, "compute_loss_func": OWN_LOSS}
    refused_options: Mapping[str, str] = {
        "label_smoothing_factor": "F2C has no labels to smooth: leave it 0",
        "batch_eval_metrics": "consistency is computed over all items at once: set it to False",
        "use_liger_kernel": "Liger would replace the forward that is patched: set it to False",
    }
    averages_items = True
    _signature_columns: Any

    def __init__(self, model: Any, args: F2CConfig | None = None, **kwargs: Any):
        args = self.configured(args, kwargs)
        refuse_encoder_decoder(model)
        patch(model)
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = ItemCollator(getattr(kwargs.get("processing_class"), "pad_token_id", None) or 0)
        super().__init__(model=model, args=args, **kwargs)
        self._choices = 0  # C of the last batch that was evaluated

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *COLUMNS]))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss over the items of a batch; with `return_outputs`, also the answers of all formats [B, K]."""
        scores = self.scores(model, inputs)
        labels = [consensus(table) for table in scores]
        for label in labels:
            self._note("consensus", float(label is not None))
        if self.args.method == "swarm":
            picks = [(item, label) for item in range(len(scores)) for label in range(scores.shape[2])]
        else:
            picks = [(item, label) for item, label in enumerate(labels) if label is not None]
        if picks:
            logp, targets = self._rows(model, inputs, picks)
            loss = torch.stack([self._term(*part, scores) for part in zip(picks, logp, targets, strict=True)]).sum()
        else:  # nothing to learn: a zero connected to the model, for wrappers that wait for its gradients
            loss = self._rows(model, inputs, [(0, 0)], slice(0, 1))[0].sum() * 0
        loss = loss / (len(scores) * scores.shape[2])
        return (loss, {"predictions": scores.argmax(-1)}) if return_outputs else loss

    @torch.no_grad()
    def scores(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Mean log-probabilities of the answers' tokens [B, K, C], in evaluation mode."""
        with eval_mode(model):
            logits = prefix_logits(model, *(inputs[name].flatten(0, 2) for name in ROW))
            return answer_means(logits, inputs["answers"])

    def _term(self, pick: tuple[int, int], logp: Tensor, targets: Tensor, scores: Tensor) -> Tensor:
        """The loss of one item and answer, before the division by C, from logp [K, T, V] at its tokens [K, T]."""
        args, valid = self.args, targets != -100
        if args.method == "swarm":
            total, count = alignment((logp, valid), (logp, valid))
            return total / count.clamp(min=1)
        item, label = pick
        nll = -logp.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
        cce = (torch.where(valid, nll, 0.0).sum(-1) / valid.sum(-1)).mean()
        self._note("loss_cce", cce)
        loss = args.cce_weight * cce
        if args.method == "f2c":
            parts = split(scores[item], label, args.threshold, args.top_k)
            agreed, aligned, weight = self._consistency(parts, logp, targets, scores[item, :, label])
            self._note("loss_agreement", agreed)
            self._note("loss_alignment", aligned)
            loss = loss + args.agreement_weight * agreed + weight * aligned
        return loss

    def _consistency(self, parts: Split, logp: Tensor, targets: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, float]:
        """J, A and the weight of A."""
        args, valid, zero = self.args, targets != -100, logp.new_zeros(())
        agreed, aligned, aligned_tokens = zero, zero, zero
        agreeing_tokens = valid[list(parts.agreeing)].sum().clamp(min=1)
        for group in self._groups(targets):
            agreeing, teachers, students = (
                [k for k in formats if k in group] for formats in (parts.agreeing, parts.teachers, parts.students)
            )
            if agreeing:
                share = valid[agreeing].sum() / agreeing_tokens
                agreed = agreed + share * agreement(logp[agreeing], valid[agreeing])
            if teachers and students:
                total, count = alignment((logp[teachers], valid[teachers]), (logp[students], valid[students]))
                aligned, aligned_tokens = aligned + total, aligned_tokens + count
        if not parts.teachers:
            return agreed, zero, 0.0
        gap = scores[list(parts.teachers)].mean() - scores[list(parts.students)].mean()
        span = args.alignment_max - args.alignment_min
        weight = args.alignment_min + span * float(torch.sigmoid(gap / args.weight_temperature))
        return agreed, aligned / aligned_tokens.clamp(min=1), weight

    def _groups(self, targets: Tensor) -> list[list[int]]:
        """Formats that are compared with each other."""
        if not self.args.group_answers:
            return [list(range(len(targets)))]
        formats: dict[tuple[int, ...], list[int]] = {}  # tokens -> the formats whose answer they are
        for k, tokens in enumerate(targets.tolist()):
            formats.setdefault(tuple(tokens), []).append(k)
        return list(formats.values())

    def _rows(
        self, model: nn.Module, inputs: dict[str, Any], picks: list[tuple[int, int]], formats: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities [n, K, T, V] at the tokens of n answers (item, label), and the tokens, padded by -100."""
        items, labels = ([pick[i] for pick in picks] for i in (0, 1))
        chosen = [inputs[name][items, formats, labels] for name in ROW]
        shape = chosen[0].shape[:2]
        ids, mask, answers = (x.flatten(0, 1) for x in chosen)
        logits = prefix_logits(model, ids, mask, answers)
        predicts = answers[:, 1:] != -100  # the positions that predict an answer's token
        length = int(predicts.sum(-1).max())
        first = predicts.int().argmax(-1)
        position = (first[:, None] + torch.arange(length, device=ids.device)).clamp(max=ids.shape[1] - 2)
        inside = torch.arange(length, device=ids.device) < predicts.sum(-1, keepdim=True)
        targets = torch.where(inside, answers[:, 1:].gather(1, position), -100)
        rows: Any = logits[
            torch.arange(len(ids), device=ids.device)[:, None], position
        ]  # only these go through the head
        logp = rows.with_head(lambda hidden, head: head.logits(hidden)).log_softmax(-1)
        return logp.unflatten(0, shape), targets.unflatten(0, shape)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, answers of all formats [B, K], and true labels [B] if there are any (-1 for unknown ones).

        Raises:
            ValueError: A `gold` is not the number of an answer.
        """
        inputs = self._prepare_inputs(inputs)
        gold, self._choices = inputs.get("gold"), inputs["answers"].shape[2]
        check_gold(gold, self._choices)
        with self._step(training=False), torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if self.args.prediction_loss_only or (prediction_loss_only and gold is None):
            return loss, None, None
        return loss, outputs["predictions"], gold

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer`, and the consistency of the answers where true labels are known."""
        output = super().evaluation_loop(*args, **kwargs)
        if output.label_ids is None or output.predictions is None:
            return output
        predictions, gold = _concatenated(output.predictions), _concatenated(output.label_ids)
        if (known := gold >= 0).any():
            prefix = kwargs.get("metric_key_prefix", "eval")
            report = consistency(predictions[known], gold[known], self._choices).as_dict()
            output.metrics.update({f"{prefix}_{name}": value for name, value in report.items()})
        return output


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)


def _concatenated(parts: Any) -> np.ndarray:
    """The arrays that evaluation gathered as one; `eval_do_concat_batches=False` leaves them in parts."""
    return np.concatenate(parts) if isinstance(parts, list) else np.asarray(parts)

"""Supervised fine-tuning by TRL's data pipeline, under any registered loss, with weights of rows, tokens and turns.

TRL's trainer takes its loss from log-probabilities, so it knows cross-entropy (and DFT) alone, and no weights
(trl#5761). Here its step runs unchanged, but what it calls in place of the model returns the registered loss, computed
without logits; its packing, padding-free batches, masks of prompts and of other turns than the assistant's, auxiliary
losses and logs (`entropy`, `mean_token_accuracy`, `num_tokens`) stay.

Data: as for `trl.SFTTrainer`. Weights, all of them optional and multiplied with each other: `loss_weight`, a number per
row; `token_weights`, a list per row, beside `input_ids`; and `weight` in turns of `messages`, or of `prompt` and
`completion` (`hf_xent.data.chat`). They come through tokenization, truncation and packing; the formula is that of
`hf_xent.trainers.weights`. A weight has an effect on labels that TRL's masks leave.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import trl
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils as trl_utils

from .. import losses
from ..hub import Carded, Tokenless
from ..losses.base import Loss
from ..patching import head_of, inner_of, patch, patch_state
from .base import Method
from .evaluated import Evaluated
from .loss_options import LossOptions
from .refusals import refuse_encoder_decoder
from .sft_data import Joined, mapped, parted, weighs
from .weighted import Weighted
from .weights import TOKENS, WithWeights


@dataclass
class StreamedSFTConfig(LossOptions, Tokenless, SFTConfig):
    """`trl.SFTConfig`, the loss, and what evaluations measure.

    Raises:
        ValueError: A field has a value out of its range or of another type.
    """


class StreamedSFTTrainer(Weighted, Evaluated, Method, Carded, SFTTrainer):
    """`trl.SFTTrainer` under any registered loss, with weighted labels; see the module's docstring.

        loss = sum over all labels of a step of w_t loss_t / sum of w_t          w_t = 1 without weights

    Args:
        model: A causal LM, or its Hub id or path. It is patched.
        args: The configuration; `StreamedSFTConfig(output_dir="out")` if it is left out.
        loss: Registry name or `hf_xent.losses.Loss`; it takes precedence over `args.loss`.
        **kwargs: As for `trl.SFTTrainer`, but without `compute_loss_func`. A data collator of yours gets rows without
            their weights.

    Raises:
        ValueError: An unknown loss, the configuration of another trainer, options without effect, weights that do not
            fit their labels, or a model that cannot be patched.
        RuntimeError: In training, the model computes its loss from logits that something has made.
    """

    config_class: type = StreamedSFTConfig
    args: StreamedSFTConfig
    refused_options: Mapping[str, str] = {
        "loss_type": "the loss is chosen by loss: leave loss_type at 'nll'",
        "label_smoothing_factor": "TRL would compute logits for it: choose loss='cross_entropy:label_smoothing=0.1'",
        "use_liger_kernel": "Liger's loss would replace this trainer's: set it to False",
    }
    refused_arguments: Mapping[str, str] = {"compute_loss_func": "the loss is a registered one: pass loss"}
    _predictions: Any = None  # of the last batch that was measured
    _name = "SFT"
    _tag_names = ["trl", "sft", "hf_xent"]  # noqa: RUF012  TRL's attribute

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: StreamedSFTConfig | None = None,
        *,
        loss: str | Loss | None = None,
        **kwargs: Any,
    ):
        args = self.configured(args, kwargs)
        self.objective = losses.get(loss or args.loss)
        if not isinstance(model, str):  # TRL loads a path or Hub id
            refuse_encoder_decoder(model)
            head_of(model)  # raises for a model that is not a language model
        if not hasattr(trl_utils, "add_fused_lm_head"):
            raise ImportError(
                f"TRL is {trl.__version__}, whose SFTTrainer has no fused head: install TRL 1.16 or newer"
            )
        super().__init__(model=model, args=args, **kwargs)
        patch(self.model, self.objective, observe=("entropy", "top"), memory_budget=args.memory_budget, tail=args.tail)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """As TRL, in two passes if there are weights, which the labels carry through the second one."""
        prepare = super()._prepare_dataset
        if not weighs(dataset):
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        whole: Any = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = prepare(dataset, processing_class, whole, False, formatting_func, dataset_name)
        dataset = mapped(dataset, Joined(self._tokenizer, self.chat_template), "labels")
        dataset = prepare(dataset, processing_class, args, packing, None, dataset_name)
        return mapped(dataset, parted, "labels", TOKENS)

    def _reject_skip_prepare_without_labels(self, datasets: Any, data_collator: Any) -> None:
        inner = data_collator.inner if isinstance(data_collator, WithWeights) else data_collator
        super()._reject_skip_prepare_without_labels(datasets, inner)  # which looks at the collator's class

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As TRL, of the registered loss. Raises: RuntimeError if the logits are computed by something else."""
        items = None
        if num_items_in_batch is not None:  # without labels in the whole step the loss is 0, not 0 / 0
            items = torch.as_tensor(num_items_in_batch)
            items = torch.where(items == 0, 1, items)
        divided = None if items is None else torch.ones(())  # TRL has nothing to divide by then
        return super().compute_loss(_Forward(self, model, items), dict(inputs), return_outputs, divided)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As TRL; with `streamed_metrics`, the predictions are these, and no logits are computed."""
        streamed = self.args.streamed_metrics and not prediction_loss_only
        self._predictions = None
        step = super().prediction_step(model, inputs, prediction_loss_only or streamed, ignore_keys)
        if not streamed:
            return step
        return step[0], tuple(self._predictions.values()), self._prepare_inputs(inputs)["labels"]

    def _streamed_loss(self, model: Any, inputs: dict[str, Any], items: Any) -> SimpleNamespace:
        """What TRL's `compute_loss` reads of its fused head, with the registered loss as the log-probability."""
        state, training = patch_state(self.model), self.model.training
        state.take(training=training)
        loss, output = self._scored(model, inputs, items)
        sums = state.take(training=training)
        if not sums:
            raise RuntimeError(f"no loss was computed without logits: {state.why_dense}; train with trl.SFTTrainer")
        if self._in_training is False:
            self._predictions = self._measured(output.logits, inputs)
        divisor = 1 if items is not None else sums["tokens"].clamp(min=1)  # TRL divides by it
        return SimpleNamespace(
            log_probs=-loss * divisor,
            label_mask=sums["tokens"],
            entropy=sums["entropy"],
            is_top1=sums["correct"],
            aux_loss=getattr(output, "aux_loss", None),
        )

    def _scored(self, model: Any, inputs: dict[str, Any], items: Any) -> tuple[Any, Any]:
        """The registered loss of a batch, divided by `items` if given, and the model's output."""
        output = model(**inputs, **({} if items is None else {"num_items_in_batch": items}))
        loss, aux_loss = output.loss, getattr(output, "aux_loss", None)
        if self.aux_loss_enabled and aux_loss is not None:  # TRL adds it, with a weight of its own
            inner: Any = inner_of(self.model)
            weight = getattr(inner, "router_aux_loss_coef", self.router_aux_loss_coef)
            loss = loss - weight * aux_loss.to(loss.device)
        return loss, output


@dataclass(eq=False)
class _Forward:
    """Stands in for the model in TRL's `compute_loss`: a call of its fused head returns the registered loss."""

    trainer: StreamedSFTTrainer
    model: Any
    items: Any

    def __call__(self, fused_lm_head: bool = False, **inputs: Any) -> Any:
        """What TRL reads of the call."""
        if fused_lm_head:
            return self.trainer._streamed_loss(self.model, inputs, self.items)
        return self.model(**{name: x for name, x in inputs.items() if name != TOKENS})

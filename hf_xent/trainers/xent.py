"""Training of language models without logits, under any registered loss.

What changes with respect to `transformers.Trainer`: the model is patched, and the statistics of the tokens that its
loss computes anyway (entropy, accuracy, perplexity) are logged.

Data: `input_ids` and `labels` (or what else the model takes), or `input_ids` alone with a language-modeling collator;
and the weights of labels in `token_weights` or `loss_weight`, see `hf_xent.trainers.weights`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .. import losses
from ..hub import Carded, Tokenless
from ..losses.base import Loss
from ..losses.cross_entropy import CrossEntropy
from ..patching import lazily, patch, patch_state
from .base import Method
from .batches import refuse_unlabeled, shifts_labels
from .evaluated import Evaluated
from .loss_options import LossOptions
from .refusals import NO_MODEL_INIT
from .split_sequences import SplitSequences
from .weighted import Weighted
from .weights import TOKENS


@dataclass
class XentConfig(LossOptions, Tokenless, TrainingArguments):
    """`transformers.TrainingArguments`, the loss, and what evaluations measure.

    Raises:
        ValueError: A field has a value out of its range or of another type.
    """


class XentTrainer(Weighted, Evaluated, Method, Carded, SplitSequences, Trainer):
    """Fine-tunes a language model under a loss of the registry; see the module's docstring.

        loss = sum over all labels of a step of loss_t / their number          by default -log p(label)

    The loss is divided by the number of tokens of the whole accumulated batch, as transformers does. Columns of the
    data sets may weigh labels (`token_weights`, a list per row) and rows (`loss_weight`, a number); then the loss is

        loss = sum over all labels of a step of w_t loss_t / sum of w_t          a weight of 0 is the label -100

    Logged beside it, unweighted: `perplexity` and `mean_token_accuracy` of the labels, and `entropy` (nats) of the
    model, means over tokens since the last log; the same of every evaluation, under its prefix, with what the options
    `eval_top_k`, `eval_calibration` and `eval_bits_per_byte` name (`hf_xent.trainers.evaluation`). With
    `streamed_metrics`, `compute_metrics` gets `StreamedMetrics` in place of logits.

    A loss that depends on the pretrained head (EMO's frozen cost) reads it from `model` as it is passed here, so pass
    the pretrained model also when resuming. `label_smoothing_factor` is streamed too, for cross-entropy. Trainers of
    one method derive from this one: they name their configuration and override `_objective` or `compute_loss`.

    Args:
        model: A language model (`AutoModelForCausalLM`, `AutoModelForSeq2SeqLM`, `AutoModelForMaskedLM`, or a PEFT
            model around one). It is patched.
        args: The configuration; `XentConfig(output_dir="out")` if it is left out.
        loss: Registry name or `hf_xent.losses.Loss`; it takes precedence over `args.loss`.
        **kwargs: As for `transformers.Trainer`. Rows of the data sets have `input_ids` and `labels`, or `input_ids`
            alone with a collator that makes the labels. A `compute_loss_func` gets lazy logits: what it computes from
            them (`F.cross_entropy`) is streamed, and logged if it is a cross-entropy.

    Raises:
        ValueError: An unknown loss, the configuration of another trainer, options without effect, an object that is not
            a data set, or a model that cannot be patched; in training, a batch without labels.
    """

    config_class: type[XentConfig] = XentConfig
    means: tuple[str, ...] = ("nll", "mean_token_accuracy", "entropy")
    refused_arguments: Mapping[str, str] = {"model_init": NO_MODEL_INIT}
    _warned = False
    _passes = 0  # forward passes of training since one that is known to have had a label
    _label_count: torch.Tensor | None = None  # the number of labels in the last step, if its loss was streamed

    def __init__(
        self,
        model: PreTrainedModel | torch.nn.Module,
        args: XentConfig | None = None,
        *,
        loss: str | Loss | None = None,
        **kwargs: Any,
    ):
        args = self.configured(args, kwargs)
        self.objective = self._objective(args, loss)
        if kwargs.get("compute_loss_func") is not None and (loss is not None or self.objective != CrossEntropy()):
            raise ValueError(
                f"compute_loss_func is given and loss is {self.objective!r}: one of them would have no effect, pass one"
            )
        self._refuse_other_losses(args)
        patch(model, self.objective, observe=("entropy", "top"), memory_budget=args.memory_budget, tail=args.tail)
        super().__init__(model=model, args=args, **kwargs)
        self.label_smoother = None  # smoothing is part of the objective; the smoother of transformers needs the logits

    @classmethod
    def _objective(cls, args: XentConfig, loss: str | Loss | None) -> Loss:
        """Returns the loss that the arguments name; a trainer of one method overrides this."""
        objective = losses.get(loss or args.loss)
        if args.label_smoothing_factor and isinstance(objective, CrossEntropy):
            return replace(objective, label_smoothing=args.label_smoothing_factor)
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor} but the loss is {objective!r}: it smooths"
                " cross-entropy only; use the loss's own options"
            )
        return objective

    def _refuse_other_losses(self, args: XentConfig) -> None:
        """Raises: ValueError for options under which Liger would compute the loss."""
        if args.use_liger_kernel and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
            raise ValueError(
                "use_liger_kernel is True, but Liger's fused loss would replace the forward that is patched: set it to"
                " False, or liger_kernel_config={'fused_linear_cross_entropy': False}"
            )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """As `Trainer`; a `compute_loss_func` gets lazy logits, and an evaluation's outputs may be without logits.

        Raises:
            ValueError: A batch has no labels, or weights that a `compute_loss_func` does not get.
        """
        if self.compute_loss_func is None:
            refuse_unlabeled(inputs)
            result = self._loss_of_model(model, inputs, return_outputs, num_items_in_batch)
        elif TOKENS in inputs:
            raise ValueError(
                f"compute_loss_func is given, but a batch has {TOKENS}, which it does not get: remove the column, or"
                " use a registered loss"
            )
        else:
            with lazily(model):  # Trainer takes the labels out of the inputs, and calls the model without them
                result = super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)
        if not return_outputs:
            return result
        loss, outputs = result
        measured = self._measured(outputs["logits"], inputs)
        return loss, outputs if measured is None else {"loss": loss, **measured}

    def _loss_of_model(self, model: Any, inputs: dict[str, Any], return_outputs: bool, num_items: Any) -> Any:
        """The loss that the model returns, divided by the labels of all accumulated batches, if they are counted.

        transformers' encoder-decoders and masked language models take `num_items_in_batch` without reading it, so that
        its trainer adds up the means of accumulated batches. Their mean is weighed by the batch's share of labels here.
        """
        if num_items is None or shifts_labels(self.model):
            return super().compute_loss(model, inputs, return_outputs, num_items)
        loss, outputs = super().compute_loss(model, dict(inputs), True)
        loss = loss * self._weights_of(inputs).sum() / num_items * self._averaged_by
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: torch.nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """As `Trainer`; without labels the loss is NaN, as a stock model's: transformers leaves it out of the mean."""
        logits_are_kept = not prediction_loss_only and not self.args.streamed_metrics
        # a compiled model would compute logits in evaluation
        with nullcontext() if logits_are_kept else lazily(model):
            loss, *outputs = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None and self._label_count is not None and self.compute_loss_func is None:
            loss = torch.where(self._label_count.to(loss.device) > 0, loss, torch.nan)
        return (loss, *outputs)

    @contextmanager
    def _step(self, *, training: bool) -> Iterator[None]:
        state = patch_state(self.model)
        state.sums.clear()  # forward passes outside of steps may have left some
        self._label_count = None
        with super()._step(training=training):
            yield
            for sums in state.sums.values():
                self._passes += training
                self._label_count = sums["tokens"]
                for name, key in zip(XentTrainer.means, ("nll", "correct", "entropy"), strict=True):
                    self._note(name, sums[key], sums["tokens"])
        state.sums.clear()

    def _means(self, training: bool) -> dict[str, float]:
        """Means over tokens, perplexity first; warns if there are none."""
        recorded = "nll" in self._sums[training]
        means = super()._means(training)
        nll = means.pop("nll", None)
        if nll is not None:
            self._passes = 0 if training else self._passes
            return {"perplexity": float(torch.tensor(nll, dtype=torch.float64).exp()), **means}
        if not recorded and training and self.compute_loss_func is None:
            self._warn(
                f"no loss was computed without logits, and no perplexity is logged: {patch_state(self.model).why_dense}"
            )
        elif recorded and (self._passes > 1 or not training):  # all labels of a single batch may be masked
            self._warn(
                f"no token has a label {'since the last log' if training else 'in this evaluation'} (every label is"
                " -100), so there is no perplexity and nothing to learn: check what the data collator masks"
            )
        return means

    def _warn(self, text: str) -> None:
        """Warns, once per trainer."""
        if not self._warned:
            self._warned = True
            warnings.warn(text, stacklevel=2)

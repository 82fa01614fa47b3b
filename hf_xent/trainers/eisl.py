"""Training on noisy targets under the edit-invariant sequence loss (EISL), after steps of plain cross-entropy.

    loss = CE                                                          in the first `ce_steps` steps
           ngram_factor sum_n w_n EISL_n + ce_factor CE                afterwards

EISL matches n-grams of the target wherever they occur in the output (`hf_xent.losses.EISL` has the formula); it needs a
model that has learned by cross-entropy what to say. Under teacher forcing each output is conditioned on what precedes
it in the noisy target. So afterwards the inputs of the decoder can be the model's own:

    x'_t = argmax_v p(v | x_{<t}, source) with probability `own_inputs`, else x_t, at every input that is made of a
           label; p is of a first pass over the target's inputs x, in evaluation mode, without a gradient

For a causal LM these are the tokens of `input_ids` that have a label; the labels stay as they are. This is scheduled
sampling in two passes, one forward more for every batch. The authors instead feed a decoder all outputs of its last
step, one token after the other, so that no output depends on the target; here each prediction does depend on the target
before it, and stands where the target's token stood. Which inputs are replaced depends on the seed, the step and the
row's labels: torch's generators are not read, and neither resuming nor how a step is split into batches changes it.

Evaluation is under the second line, with the target's inputs; `eval_perplexity` is that of cross-entropy. Baselines run
in the same trainer, with the same steps and inputs: `EISLConfig(loss="tailr", ce_steps=500)`.

The authors fine-tune BART-base by cross-entropy for 2000 updates at a learning rate of 3e-5, then under EISL with n = 1
and 2 at 1e-5; both factors are arguments without a default there. `gumbel=True` is theirs.

Source: Liu et al. 2022, arXiv:2106.15078, with the authors' code, github.com/guangyliu/EISL; two passes: Mihaylova and
Martins 2019, Scheduled Sampling for Transformers, arXiv:1906.07651.
Data: as for `XentTrainer`; `hf_xent.data.target_noise` makes targets noisy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ..losses.base import Loss
from ..losses.cross_entropy import CrossEntropy
from ..losses.eisl import EISL
from ..options.ranges import whole_numbers
from ..patching import inner_of
from ..patching.calls import objective_of
from .batches import refuse_unlabeled, shifts_labels
from .own_inputs import is_encoder_decoder, replaced
from .refusals import OWN_LOSS, refuse_options
from .xent import XentConfig, XentTrainer

OPTIONS = ("ngrams", "ngram_weights", "ngram_factor", "ce_factor", "gumbel")


@dataclass
class EISLConfig(XentConfig):
    """`XentConfig` and the options of EISL.

    Raises:
        ValueError: A field has a value out of its range or of another type, or would have no effect.
    """

    ranges: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("ngram_factor", "ce_factor", "ce_steps"), "[0, inf)"),
        "own_inputs": "[0, 1]",
    }

    loss: str = field(
        default="eisl",
        metadata={"help": "'eisl', with the options below; any other loss of the registry trains a baseline instead."},
    )
    ngrams: str = field(
        default="1,2",
        metadata={"help": "Lengths n, with commas between them; 0 is the whole target, -1 one less, ..."},
    )
    ngram_weights: str | None = field(
        default=None, metadata={"help": "A weight for each of ngrams, with commas between them; default: equal, sum 1."}
    )
    ngram_factor: float = field(default=1.0, metadata={"help": "Weight of the n-gram loss."})
    ce_factor: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy that is added to it."})
    gumbel: bool = field(
        default=False, metadata={"help": "Whether positions are weighed by Gumbel-softmax, as in the paper."}
    )
    ce_steps: float = field(
        default=0.0,
        metadata={"help": "Steps of cross-entropy alone at first; a number below 1 is a share of all steps."},
    )
    own_inputs: float = field(
        default=0.0,
        metadata={
            "help": "Share of the decoder's inputs after ce_steps that are the model's own predictions; one forward"
            " pass more per batch."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ce_steps > 1 and self.ce_steps % 1:
            raise ValueError(f"ce_steps is {self.ce_steps}: choose a whole number, or a share of all steps below 1")
        if self.loss == "eisl" and self.ngram_factor == 0:
            raise ValueError("ngram_factor is 0, which leaves EISL out: choose a positive number, or another loss")
        self.sequence_loss()

    def sequence_loss(self) -> EISL:
        """The loss after `ce_steps`, by the options above. Raises: ValueError if they do not fit."""
        try:
            weights = self.ngram_weights and tuple(float(weight) for weight in self.ngram_weights.split(","))
        except ValueError:
            raise ValueError(f"ngram_weights is {self.ngram_weights!r}: give numbers, with commas") from None
        ngrams = tuple(whole_numbers("ngrams", self.ngrams))
        return EISL(ngrams, weights or None, self.ngram_factor, self.gumbel, ce_factor=self.ce_factor)


class EISLTrainer(XentTrainer):
    """Trains a language model on noisy targets: cross-entropy first, then EISL; see the module's docstring.

        loss = CE, then ngram_factor sum_n w_n EISL_n + ce_factor CE

    Logged beside what `XentTrainer` logs, with `own_inputs`: `changed_inputs`, the share of the decoder's inputs that
    are another token than the target's.

    Args:
        model: A language model, as for `XentTrainer`; with `own_inputs` an encoder and a decoder, or a causal LM.
        args: The configuration; `EISLConfig(output_dir="out")` if it is left out.
        **kwargs: As for `XentTrainer`, but without `compute_loss_func`; a `loss`, of a baseline, takes precedence over
            `args.loss`.

    Raises:
        ValueError: Options that do not fit each other, the loss or the model, or what `XentTrainer` refuses; in
            training with `own_inputs`, a batch whose decoder has no tokens as inputs.

    Source: Liu et al. 2022, arXiv:2106.15078.
    """

    config_class = EISLConfig
    args: EISLConfig
    means = ("changed_inputs",)
    splits_sequences = False
    refused_arguments: Mapping[str, str] = {"compute_loss_func": OWN_LOSS}

    def __init__(self, model: Any, args: EISLConfig | None = None, **kwargs: Any):
        args = self.configured(args, kwargs)
        if args.own_inputs and not (is_encoder_decoder(model) or shifts_labels(model)):
            raise ValueError(
                f"own_inputs is {args.own_inputs}, but model is a {type(inner_of(model)).__name__}, whose outputs do"
                " not depend on targets: leave it 0"
            )
        super().__init__(model, args, **kwargs)
        self._patched_loss = getattr(objective_of(inner_of(self.model)), "loss", None)  # with the tensors it has bound

    @classmethod
    def _objective(cls, args: XentConfig, loss: str | Loss | None) -> Loss:
        name = loss or args.loss
        if name != "eisl":
            refuse_options(args, dict.fromkeys(OPTIONS, f"the loss is {name!r}: it is an option of loss='eisl' alone"))
            return super()._objective(args, loss)
        refuse_options(args, {"label_smoothing_factor": "it smooths cross-entropy only, and the loss is EISL"})
        assert isinstance(args, EISLConfig)
        return args.sequence_loss()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """As `XentTrainer`, under the loss and with the inputs of this step.

        Raises:
            ValueError: A batch has no labels, or, with `own_inputs`, its decoder has no tokens as inputs.
        """
        refuse_unlabeled(inputs)
        is_first = model.training and self.state.global_step < self._ce_steps
        if self.args.own_inputs and model.training and not is_first:
            key = f"{self.args.seed}, {self.state.global_step}"
            inputs, changed, count = replaced(model, inputs, self.args.own_inputs, key)
            self._note("changed_inputs", changed, count)
        objective = objective_of(inner_of(self.model))  # none, if the loss is cross-entropy anyway
        if objective is not None:
            assert self._patched_loss is not None
            objective.loss = CrossEntropy() if is_first else self._patched_loss
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    @property
    def _ce_steps(self) -> int:
        """The number of steps of cross-entropy alone; a share is rounded up, as that of `warmup_steps` is."""
        steps = self.args.ce_steps
        return int(steps) if steps >= 1 else math.ceil(steps * self.state.max_steps)

"""Training of causal LMs without logits, under any registered loss.

The only change with respect to `transformers.Trainer` is `log`: the model is patched, and what its loss already knew
about the tokens (entropy, accuracy, perplexity) is logged.

Data: `input_ids` and `labels` (as for any causal LM), or `input_ids` alone with a language-modeling collator.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from .. import losses
from ..hub import Carded, Tokenless
from ..losses import CrossEntropy, Loss
from ..patching import patch, seam_of


@dataclass
class XentConfig(Tokenless, TrainingArguments):
    """`transformers.TrainingArguments` and the loss."""

    loss: str = field(
        default="cross_entropy",
        metadata={
            "help": "Registry name of the loss, with options if any: 'focal:gamma=3'. `hf-xent losses` lists them."
        },
    )
    memory_budget: int | None = field(
        default=None,
        metadata={"help": "Bytes of logits alive at a time; default: half a byte a number in the head."},
    )
    tail: float = field(
        default=0.0,
        metadata={
            "help": "Relative error allowed to the gradient of the logits by compressing unlikely tokens, such as 1e-3;"
            " 0 is exact. For losses of log p alone."
        },
    )


class XentTrainer(Carded, Trainer):  # subclasses of one method name their configuration and override one method
    """Fine-tunes a causal LM under a loss of the registry; see the module's docstring.

    `loss` (a name or a `hf_xent.losses.Loss`) goes before `args.loss`. A loss that takes something from the pretrained
    head (EMO's frozen cost) takes it from `model` as it is given here, so give the pretrained model also when resuming.
    The loss is divided by the number of tokens of the whole accumulated batch, as transformers does. Logged beside it:
    `perplexity` and `mean_token_accuracy` of the labels, and `entropy` (nats) of the model, means over tokens since the
    last log; the same with `eval_`. `label_smoothing_factor` is streamed too, for cross-entropy.

    Raises: ValueError for an unknown loss or a model that cannot be patched.
    """

    config_class: type[XentConfig] = XentConfig

    def __init__(
        self,
        model: PreTrainedModel | torch.nn.Module,
        args: XentConfig | None = None,
        *,
        loss: str | Loss | None = None,
        **kwargs: Any,
    ):
        args = self.config_class(output_dir="out") if args is None else args
        self.objective = self._objective(args, loss)
        patch(model, self.objective, observe=("entropy", "top"), memory_budget=args.memory_budget, tail=args.tail)
        super().__init__(model=model, args=args, **kwargs)
        self.label_smoother = None  # part of the objective: transformers' own needs the logits

    @classmethod
    def _objective(cls, args: XentConfig, loss: str | Loss | None) -> Loss:
        """The loss that arguments ask for; what a trainer of one method overrides."""
        objective = losses.get(loss or args.loss)
        if args.label_smoothing_factor and isinstance(objective, CrossEntropy):
            return CrossEntropy(label_smoothing=args.label_smoothing_factor, z_loss=objective.z_loss)
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor} but the loss is {objective!r}: it smooths"
                " cross-entropy only; use the loss's own options"
            )
        return objective

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds perplexity, token accuracy and entropy since the last log, over all processes."""
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        if prefix or "loss" in logs:
            taken = seam_of(self.model).take(training=not prefix)
            sums = {name: self._total(value) for name, value in taken.items()}
            tokens = max(1.0, sums.get("tokens", 0.0))
            if "nll" in sums:
                logs[prefix + "perplexity"] = float(torch.tensor(sums["nll"] / tokens, dtype=torch.float64).exp())
            if "correct" in sums:
                logs[prefix + "mean_token_accuracy"] = sums["correct"] / tokens
            if "entropy" in sums:
                logs[prefix + "entropy"] = sums["entropy"] / tokens
        super().log(logs, start_time)

    def _total(self, value: Tensor) -> float:
        return float(self.accelerator.reduce(value.double(), reduction="sum"))

"""Preference training with soft labels (SPCE); also cDPO, a weight for every pair, and PSO's weighting.

DPO uses which answer is better, but not by how much. With p = P(chosen > rejected), the margin Delta between the two,
the pair's weight w and z = beta Delta,

    loss = w [ -p log sigmoid(z) - (1 - p) log sigmoid(-z) ] = w [ DPO + (1 - p) z ]          method="spce"
    loss = w |2p - 1| [ -log sigmoid(z) ]                      with -z for z if p < 1/2       method="pso"

whose gradient in Delta, w beta (sigmoid(z) - p), is zero at the finite margin logit(p) / beta. p = 1 is DPO, p = 1/2
pulls the margin to 0, and exchanging the answers together with p and 1 - p changes nothing. `label_smoothing` eps turns
p into p (1 - eps) + (1 - p) eps: for p = 1 that is cDPO, whereas TRL's `sigmoid` loss ignores the option.

Delta is what TRL computes: the difference of the scores of its f-divergence (log-ratios for the reverse KL), of whole
answers (`ld_alpha` included), or per token for `sigmoid_norm`. TRL's step runs unchanged; to its loss is added

    mean over pairs of (v - 1) softplus(-z) + v (1 - q) z         q the label and v the weight of a pair, as above

so it is TRL's to the last bit for q = v = 1. The mean is over pairs, not over their weights: a batch's scale follows w.
TRL's other loss types depend on the label in another form and are refused, except `sft` in a mixture, which is added
without weights. WPO (`use_weighting`) is refused too.

Source: Zhai et al. 2024, Online Self-Preferring Language Models, arXiv:2405.14103 names the loss; Mitchell 2023, A note
on DPO with noisy preferences (cDPO); Rafailov et al. 2023, arXiv:2305.18290 (DPO). Re-implementations: of SPCE from its
description, of PSO (SIGIR 2025) from the statement that strength reweights pairs; |2p - 1| is our choice.
Data: columns of TRL's DPO (prompt, chosen, rejected; text or conversations), and `preference_prob` in [0, 1] and
`weight` >= 0, both optional and 1 where they are missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Number
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from trl import DPOConfig, DPOTrainer

from ..hub import Tokenless
from ..options.ranges import check_number
from .base import Method, Options
from .streamed import ANSWERS, Streamed

COLUMNS = {"preference_prob": 1.0, "weight": torch.finfo(torch.float32).max}
"""Column of the dataset -> its largest value; the smallest is 0."""
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
SOFT = ("sigmoid", "sigmoid_norm")
"""TRL's loss types that are a cross-entropy, so that the label can be soft."""


@dataclass
class SPCEConfig(Options, Tokenless, DPOConfig):
    """`trl.DPOConfig`, whose `label_smoothing` has an effect here, and the way strength enters the loss.

    Raises:
        ValueError: A field has a value out of its range or of another type, or `loss_type` has no soft labels.
    """

    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"method": ("spce", "pso")}

    method: str = field(
        default="spce",
        metadata={
            "help": "'spce': cross-entropy with the soft label preference_prob; 'pso': the hard label, weighted by"
            " |2 preference_prob - 1|."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "label_smoothing", "[0, 0.5]", "choose 0 (none) to 0.5 (no preference)")
        check_number(self, "beta", "[0, inf)")
        known = {*SOFT, "sft"}
        if not set(SOFT) & set(self.loss_type) or not set(self.loss_type) <= known:
            raise ValueError(
                f"loss_type is {self.loss_type}: only {' and '.join(SOFT)} have soft labels, and may be mixed with sft;"
                " use trl.DPOTrainer for the others"
            )
        if self.use_weighting:
            raise ValueError("use_weighting is True: WPO's weights are not defined for soft labels; set it to False")


class SPCETrainer(Method, Streamed, DPOTrainer):
    """DPO with a strength and a weight for every pair; see the module's docstring and `trl.DPOTrainer`.

        loss = w [ -p log sigmoid(z) - (1 - p) log sigmoid(-z) ]          z = beta Delta

    DPO's features all work: reference model or precomputed log-probabilities, adapters, accumulation, vision models.
    Model and reference are patched, so no tensor of the size tokens x vocabulary is made. Logged beside DPO's metrics:
    `rewards/brier`, the mean of (sigmoid(beta Delta) - preference_prob)^2, which is 1/4 for margin 0 and hard labels.

    Args:
        model: A causal LM, or its Hub id or path.
        ref_model: The reference; without it, a copy of the model as passed (or the one without adapter).
        args: The configuration; `SPCEConfig(output_dir="out")` if it is left out.
        **kwargs: As for `trl.DPOTrainer`. Rows of the data sets have TRL's columns `prompt`, `chosen` and `rejected`,
            and `preference_prob` in [0, 1] and `weight` >= 0, both 1 where they are missing.

    Raises:
        ValueError: Options that do not fit, the configuration of another trainer, a data set without its columns, a
            column with values out of range, or a model that cannot be patched.

    Source: Zhai et al. 2024, arXiv:2405.14103; Rafailov et al. 2023, arXiv:2305.18290 (DPO).
    """

    config_class: type = SPCEConfig
    columns = ANSWERS
    needed = ("chosen", "rejected")
    args: SPCEConfig
    data_collator: Any
    precompute_ref_logps: bool
    _signature_columns: Any
    _name = "SPCE"

    def __init__(self, model: Any, ref_model: Any = None, args: SPCEConfig | None = None, **kwargs: Any):
        args = self.configured(args, kwargs)
        super().__init__(model, ref_model, args, **kwargs)
        self.data_collator = WithColumns(self.data_collator)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(dataset, Dataset):  # before hours of training; streams are checked batch by batch
            for name in _columns(dataset.column_names):
                checked(name, dataset[name])
        return super()._prepare_dataset(dataset, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *COLUMNS]))

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of chosen and rejected answers [B] under the reference; as `DPOTrainer`."""
        return super().compute_ref_log_probs(model, {k: x for k, x in inputs.items() if k not in COLUMNS})

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        columns = {name: inputs[name] for name in _columns(inputs)}
        inputs = {name: x for name, x in inputs.items() if name not in COLUMNS}  # the rest goes to the model
        if not self.precompute_ref_logps:
            reference = self.model if self.ref_model is None else self.ref_model
            inputs |= zip(REFERENCE, self.compute_ref_log_probs(reference, inputs), strict=True)
        recorder = Recorder(model)
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True  # the inputs have them in either case
        try:
            result = super()._compute_loss(recorder, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        loss, *outputs = result if return_outputs else (result,)
        loss = loss + self._correction(recorder, inputs, columns)
        return (loss, *outputs) if return_outputs else loss

    def _correction(self, recorder: Recorder, inputs: dict[str, Any], columns: dict[str, Tensor]) -> Tensor:
        """The term that soft labels and weights add to TRL's loss, from the forward pass that TRL made."""
        policy = self.compute_ref_log_probs(recorder.replay, inputs)  # TRL's sums over tokens, of the policy's output
        score = scores_of(self.f_divergence_type, self.f_alpha_divergence_coef)
        scores = [score(logp - inputs[name]) for logp, name in zip(policy, REFERENCE, strict=True)]
        preference = columns.get("preference_prob", torch.ones_like(scores[0]))
        label, weight = self._targets(preference, columns.get("weight", torch.ones_like(scores[0])))
        lengths = inputs["completion_mask"].sum(1).clamp(min=1).chunk(2)
        total = torch.zeros_like(scores[0])
        for loss_type, loss_weight in zip(self.loss_types, self.loss_weights, strict=True):
            if loss_type in SOFT:
                divisors = lengths if loss_type == "sigmoid_norm" else (1, 1)
                z = self.beta * (scores[0] / divisors[0] - scores[1] / divisors[1])
                total = total + loss_weight * ((weight - 1) * F.softplus(-z) + weight * (1 - label) * z)
        self._record_brier(z.detach(), preference)
        return total.mean()

    def _targets(self, preference: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Label and weight of every pair."""
        p = self.label_smoothing + (1 - 2 * self.label_smoothing) * preference
        return (p, weight) if self.args.method == "spce" else ((p >= 0.5).to(p), weight * (2 * p - 1).abs())

    def _record_brier(self, z: Tensor, preference: Tensor) -> None:
        """Adds the Brier score to TRL's metrics, which are means over forward passes."""
        errors = self.accelerator.gather_for_metrics((z.sigmoid() - preference).square())
        self._metrics["train" if self.model.training else "eval"]["rewards/brier"].append(errors.mean().item())


class Recorder:
    """Stands in for a model: calls it, keeps its first output, and can return that again."""

    def __init__(self, model: Any):
        self.model, self.output = model, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        output = self.model(*args, **kwargs)
        self.output = output if self.output is None else self.output
        return output

    def replay(self, *args: Any, **kwargs: Any) -> Any:
        """The first output, whatever the arguments."""
        return self.output


@dataclass
class WithColumns:
    """A data collator and, beside its tensors, the columns of SPCE [B] where rows have them."""

    inner: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch. Raises: ValueError for values out of range."""
        columns = {name: checked(name, [row.get(name) for row in rows]) for name in _columns(rows[0])}
        return {**self.inner(rows), **columns}


def checked(name: str, values: Iterable[Any]) -> Tensor:
    """A column of SPCE as a tensor. Raises: ValueError for a value that is not a number, or out of its range."""
    column = list(values)
    wrong = [value for value in column if not (_is_number(value) and 0 <= value <= COLUMNS[name])]
    if wrong:
        raise ValueError(f"column {name} has {wrong[0]!r}: give a number from 0 to {COLUMNS[name]:g} in every row")
    return torch.tensor([float(value) for value in column], dtype=torch.float32)


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) or (isinstance(value, Tensor) and value.ndim == 0)


def scores_of(divergence: str, alpha: float) -> Callable[[Tensor], Tensor]:
    """f'(ratio) from log-ratios, by TRL's name of the divergence f (Wang et al. 2023, arXiv:2309.16240, as in TRL)."""
    if divergence == "forward_kl":
        return lambda r: 1 - torch.exp(-r)
    if divergence == "js_divergence":
        return lambda r: math.log(2) + F.logsigmoid(r)
    if divergence == "alpha_divergence" and abs(alpha - 1) >= 1e-6:  # at 1 TRL takes the reverse KL
        return lambda r: (torch.exp(((alpha - 1) * r).clamp(max=80)) - 1) / (alpha - 1)
    return lambda r: r


def _columns(names: Any) -> list[str]:
    return [name for name in COLUMNS if name in names]

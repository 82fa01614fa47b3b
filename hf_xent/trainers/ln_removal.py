"""Fine-tuning that removes a model's norms one by one (see `hf_xent.ln_free`), on the loss without logits.

    loss = cross-entropy + lambda mean_t (sigma_t - sigma*)^2

sigma_t is the divisor of the final norm at a token, before or after its removal; sigma*, a constant, is its mean over
the tokens that are neither the first of a sequence nor an end of text: exactly those two are pulled towards the others,
whose divisor is to serve for all. The mean is over all tokens of a forward pass that are no padding. Under accumulation
a pass counts by its share of the step's labels.

Removals happen at the beginning of their steps. What was removed and every sigma are buffers of the model, so that a
checkpoint in the middle of the schedule goes on as if it had not stopped. lambda 0.1 is the authors' for the two
smaller sizes; `hf_xent.ln_free.recipe` has their numbers by size.

Source: Baroni et al. 2025, arXiv:2507.02559, with the authors' code, github.com/submarat/removing-layer-norm.
Data: as for `XentTrainer`; with padding, an `attention_mask`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..lazy import next_token_labels
from ..ln_free.norms import FakeNorm, fake_norms, remove, sites, wrap
from ..ln_free.schedule import END, START, Schedule
from .xent import XentConfig, XentTrainer


@dataclass
class LNRemovalConfig(XentConfig):
    """`XentConfig` and the options of norm removal."""

    schedule: str = field(
        default="scaled",
        metadata={
            "help": "'scaled' to the model's depth and the number of steps; 'gpt2', 'gpt2-medium', 'gpt2-large' or"
            " 'gpt2-xl' as in the paper; 'at_once', a control."
        },
    )
    removal_start: float = field(
        default=START, metadata={"help": "Share of the steps before the first removal, for 'scaled' and 'at_once'."}
    )
    removal_end: float = field(default=END, metadata={"help": "Share before the last removal, for 'scaled'."})
    sigma_weight: float = field(default=0.1, metadata={"help": "lambda; 0 is a control."})
    sigma_momentum: float = field(default=0.9, metadata={"help": "Of every norm's running sigma."})


def schedule_of(args: LNRemovalConfig, model: nn.Module, steps: int) -> Schedule:
    """The schedule that arguments name. Raises: ValueError for an unknown name, or a start or end out of range."""
    if args.schedule == "scaled":
        return Schedule.scaled(model, steps, start=args.removal_start, end=args.removal_end)
    if args.schedule == "at_once":
        return Schedule.at_once(model, max(1, int(args.removal_start * steps)))
    return Schedule.named(args.schedule)


class LNRemovalCallback(TrainerCallback):
    """Removes the norms of a wrapped model on schedule, under any `transformers.Trainer`.

    Without a schedule it is the one that the trainer's `LNRemovalConfig` names. Wrap the model before the trainer
    resumes from a checkpoint.
    """

    def __init__(self, schedule: Schedule | None = None):
        self.schedule = schedule

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Settle the schedule. Raises: ValueError if it does not fit the model."""
        if self.schedule is None:
            assert isinstance(args, LNRemovalConfig)
            self.schedule = schedule_of(args, kwargs["model"], state.max_steps)
        self.schedule.check(kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove what is due."""
        assert self.schedule is not None
        for site in self.schedule.due(state.global_step):
            remove(kwargs["model"], site)


class LNRemovalTrainer(XentTrainer):
    """Fine-tunes a causal LM until its norms are gone; see the module's docstring and `XentTrainer`.

    Wraps the model. `schedule` goes before `args.schedule`. Logged: `norms`, how many sites are left, and `loss_sigma`,
    the auxiliary term before its weight, a mean over forward passes since the last log. Evaluation is the loss alone.

    Raises: ValueError for a model whose norms cannot be removed, or a schedule that does not fit it.
    """

    config_class = LNRemovalConfig
    args: LNRemovalConfig

    def __init__(
        self, model: Any, args: LNRemovalConfig | None = None, *, schedule: Schedule | None = None, **kwargs: Any
    ):
        args = LNRemovalConfig(output_dir="out") if args is None else args
        wrap(model, momentum=args.sigma_momentum)
        super().__init__(model, args, **kwargs)
        self.add_callback(LNRemovalCallback(schedule))
        self._terms: list[Tensor] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The loss, and in training the auxiliary term."""
        if not model.training or not self.args.sigma_weight:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self._final_spread() as spreads:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        end = self.model.config.get_text_config().eos_token_id
        term = sigma_term(spreads[0], inputs["input_ids"], inputs.get("attention_mask"), end)
        self._terms.append(term.detach())
        loss = loss + self.args.sigma_weight * self._share(inputs, num_items_in_batch) * term
        return (loss, outputs) if return_outputs else loss

    def _share(self, inputs: dict[str, Any], num_items: Tensor | None) -> Tensor | float:
        """The part of the step's labels that a forward pass has, as its loss has been scaled."""
        if num_items is None:
            return 1.0
        labels = inputs.get("shift_labels")
        labels = next_token_labels(inputs["labels"]) if labels is None else labels
        share = (labels != -100).sum() / num_items
        return share * self.accelerator.num_processes if self.args.average_tokens_across_devices else share

    @contextmanager
    def _final_spread(self) -> Iterator[list[Tensor]]:
        """Collects the final norm's divisors [B, T] of a forward pass."""
        names = {site.norm for site in sites(self.model) if site.kind == "final"}
        norm: FakeNorm = fake_norms(self.model)[names.pop()]
        spreads: list[Tensor] = []
        handle = norm.register_forward_pre_hook(lambda _, args: spreads.append(norm.spread(args[0]).squeeze(-1)))
        try:
            yield spreads
        finally:
            handle.remove()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what is left to be removed, and the auxiliary term."""
        if "loss" in logs:
            logs["norms"] = sum(not site.removed for site in sites(self.model))
            if self._terms:
                logs["loss_sigma"] = float(torch.stack(self._terms).mean())
                self._terms.clear()
        super().log(logs, start_time)


def sigma_term(spread: Tensor, ids: Tensor, mask: Tensor | None, end: int | list[int] | None) -> Tensor:
    """mean (sigma_t - sigma*)^2 of divisors [B, T] over tokens that are no padding; `end`: end-of-text ids."""
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    first = keep & (keep.cumsum(-1) == 1)
    ends = torch.tensor([] if end is None else end, device=ids.device).reshape(-1)
    usual = keep & ~first & ~torch.isin(ids, ends)
    target = spread.detach()[usual if bool(usual.any()) else keep].mean()
    return (spread - target)[keep].square().mean()

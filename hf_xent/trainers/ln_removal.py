"""Fine-tuning that removes a model's norms one by one (see `hf_xent.ln_free`), on the loss without logits.

    loss = cross-entropy + lambda mean_t (sigma_t - sigma*)^2 + mu mean_n Var_t log sigma_n,t

sigma_t is the divisor of the final norm at a token, before or after its removal; sigma*, a constant, is its mean over
the tokens that are neither the first of a sequence nor an end of text: exactly those two are pulled towards the others,
whose divisor is to serve for all. The mean is over all tokens of a forward pass that are no padding; a pass of nothing
but padding has a term of zero. Under accumulation a pass counts by its share of the step's labels, so that one without
labels counts for nothing.

mu, 0 unless given, is ours: it makes the divisors of every norm n alike, removed or not, whatever their size. It is for
models with massive activations, where a first token's residual is many times as long as the others' and one divisor
cannot serve both (in SmolLM2-135M 170 times, and a gated MLP squares it); removals then start when it has come down.
Once they have started, a pass whose term is above `spread_limit` is left out: one of its tokens has exploded, from one
gated MLP to the next, and its gradient would undo the model.

Removals happen at the beginning of their steps. What was removed and every sigma are buffers of the model, so that a
checkpoint in the middle of the schedule goes on as if it had not stopped. lambda 0.1 is the authors' for the two
smaller sizes; `hf_xent.ln_free.recipe` has their numbers by size.

Source: Baroni et al. 2025, arXiv:2507.02559, with the authors' code, github.com/submarat/removing-layer-norm.
Data: as for `XentTrainer`; with padding, an `attention_mask`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..hub import write_card
from ..lazy import next_token_labels
from ..ln_free.norms import fake_norms
from ..ln_free.removal import FINAL, remove, sites
from ..ln_free.schedule import END, START, Schedule
from ..ln_free.wrapping import wrap
from ..ops.rows import token_ids
from ..patching import head_of
from .base import refuse_encoder_decoder
from .xent import XentConfig, XentTrainer


@dataclass
class LNRemovalConfig(XentConfig):
    """`XentConfig` and the options of norm removal."""

    ranges: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("removal_start", "removal_end", "removal_taper"), "[0, 1)"),
        **dict.fromkeys(("sigma_weight", "spread_weight"), "[0, inf)"),
        "spread_limit": "(0, inf]",
        "sigma_momentum": "[0, 1]",
    }

    schedule: str = field(
        default="scaled",
        metadata={
            "help": "'scaled' to the model's depth and the number of steps; 'gpt2', 'gpt2-medium', 'gpt2-large' or"
            " 'gpt2-xl' as in the paper; 'at_once', a control unless it takes `removal_taper`."
        },
    )
    removal_start: float = field(
        default=START, metadata={"help": "Share of the steps before the first removal, for 'scaled' and 'at_once'."}
    )
    removal_end: float = field(default=END, metadata={"help": "Share before the last removal, for 'scaled'."})
    removal_taper: float = field(
        default=0.0,
        metadata={"help": "Share of the steps that a norm's removal takes, for 'scaled' and 'at_once'; 0 is a switch."},
    )
    sigma_weight: float = field(default=0.1, metadata={"help": "lambda; 0 is a control."})
    spread_weight: float = field(
        default=0.0,
        metadata={
            "help": "mu, on the variance of the logarithms of every norm's divisors: 100 for models with massive"
            " activations."
        },
    )
    spread_limit: float = field(
        default=math.inf,
        metadata={
            "help": "A forward pass in which the variance is larger is left out once removal has begun: a token has"
            " exploded in it. 0.05 for models with massive activations."
        },
    )
    sigma_momentum: float = field(default=0.9, metadata={"help": "Of every norm's running sigma."})
    sigma_median: bool = field(
        default=False,
        metadata={
            "help": "Sigma follows the median of the tokens' divisors, not their mean: for models with massive"
            " activations, where one token can explode."
        },
    )


SHARES = {"scaled": ("start", "end", "taper"), "at_once": ("start", "taper")}
"""Schedule -> which of the options `removal_...` it takes; those of the paper take none."""


def check_options(args: LNRemovalConfig, given: Schedule | None = None) -> None:
    """Raises: ValueError for an option out of its range, or one that the schedule (given, or named) has no use for."""
    if not isinstance(given, Schedule | None):
        raise ValueError(f"schedule is {given!r}: pass a Schedule, or name one in the configuration")
    takes = () if given is not None else SHARES.get(args.schedule, ())
    default = {f.name: f.default for f in fields(LNRemovalConfig)}
    for name in ("start", "end", "taper"):
        value = getattr(args, f"removal_{name}")
        if name not in takes and value != default[f"removal_{name}"]:
            kind = "a schedule of its own was given" if given is not None else f"the schedule is {args.schedule!r}"
            raise ValueError(f"removal_{name} is {value}, but {kind}, which does not take it: drop it")
    if args.spread_limit < math.inf and not args.spread_weight:
        raise ValueError(
            f"spread_limit is {args.spread_limit} and spread_weight 0: set both, it is a limit of that term"
        )
    if args.use_liger_kernel:
        raise ValueError("use_liger_kernel is True: Liger would put its norms over the removable ones, leave it out")
    if args.neftune_noise_alpha:
        raise ValueError(
            f"neftune_noise_alpha is {args.neftune_noise_alpha}: sigmas would be frozen at those of noised embeddings,"
            " which only training has, leave it out"
        )


def schedule_of(args: LNRemovalConfig, model: nn.Module, steps: int) -> Schedule:
    """The schedule that arguments name. Raises: ValueError for an unknown name, or shares of the steps out of range."""
    if args.schedule not in SHARES:
        return Schedule.named(args.schedule)
    last = args.removal_start if args.schedule == "at_once" else args.removal_end
    if not 0 <= args.removal_taper < 1 - last:
        raise ValueError(
            f"removal_taper is {args.removal_taper} and the last removal begins at {last} of the steps: their sum must"
            " stay below 1"
        )
    taper = int(args.removal_taper * steps)
    if args.schedule == "scaled":
        return Schedule.scaled(model, steps, start=args.removal_start, end=args.removal_end, taper=taper)
    return Schedule.at_once(model, max(1, int(args.removal_start * steps)), taper)


class LNRemovalCallback(TrainerCallback):
    """Removes the norms of a wrapped model on schedule, under any `transformers.Trainer`.

    Without a schedule it is the one that the trainer's `LNRemovalConfig` names. Wrap the model before the trainer
    resumes from a checkpoint.
    """

    def __init__(self, schedule: Schedule | None = None):
        self.given = self.schedule = schedule
        self._begun: dict[str, float] | None = None  # shares when a training began that has not ended

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Settle the schedule for this number of steps. Raises: ValueError if it does not fit the model or the steps.

        A training that begins again from its first step, as `auto_find_batch_size` makes it, has its norms again.
        """
        model = kwargs["model"]
        if self.given is None:
            if not isinstance(args, LNRemovalConfig):
                raise ValueError(f"args is a {type(args).__name__}, which names no schedule: pass one to the callback")
            self.schedule = schedule_of(args, model, state.max_steps)
        assert self.schedule is not None
        scaled = self.given is None and args.schedule in SHARES  # made for these steps
        self.schedule.check(model, None if scaled else state.max_steps)
        if self._begun is not None and state.global_step == 0:
            for site, share in self._begun.items():
                remove(model, site, share)
        self._begun = {site.name: site.share for site in sites(model)}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What was removed stays so."""
        self._begun = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove what is due."""
        assert self.schedule is not None
        for site, share in self.schedule.due(state.global_step).items():
            remove(kwargs["model"], site, share)


class LNRemovalTrainer(XentTrainer):
    """Fine-tunes a causal LM until its norms are gone; see the module's docstring and `XentTrainer`.

    Wraps the model. `schedule` goes before `args.schedule`. Logged: `norms`, how many sites are left, `loss_sigma` and
    `loss_spread`, the auxiliary terms before their weights, means over forward passes since the last log, and
    `exploded`, how many of these were left out if there is a limit; all of them over all processes. Evaluation is the
    loss alone. Of evaluations, and so of checkpoints for `load_best_model_at_end`, those without norms compete.

    What is saved is what training goes on from: stock weights, sigmas and removals. `hf_xent.ln_free.load` reads it, a
    stock class would normalize again: `save_model` and `push_to_hub` leave a card that says so.

    Raises: ValueError for a model whose norms cannot be removed, an option that would have no effect, and, in training,
    a schedule that does not fit model or steps, or `spread_weight` under reentrant checkpointing.
    """

    config_class = LNRemovalConfig
    args: LNRemovalConfig

    def __init__(
        self, model: Any, args: LNRemovalConfig | None = None, *, schedule: Schedule | None = None, **kwargs: Any
    ):
        args = self.configured(args)
        check_options(args, schedule)
        refuse_encoder_decoder(model)
        head_of(model)  # refuses what is no language model
        wrap(model, momentum=args.sigma_momentum, median=args.sigma_median)
        if args.sigma_weight and all(norm.sites != FINAL for norm in fake_norms(model).values()):
            raise ValueError(
                f"sigma_weight is {args.sigma_weight}, a weight of the norm before the head, which"
                f" {type(model).__name__} does not have: set it to 0"
            )
        super().__init__(model, args, **kwargs)
        self.add_callback(LNRemovalCallback(schedule))
        self._weights = {"sigma": args.sigma_weight, "spread": args.spread_weight}
        self._terms: dict[str, list[Tensor]] = {name: [] for name, weight in self._weights.items() if weight}
        self._exploded = 0
        for norm in fake_norms(model).values():
            norm.record_sigma = bool(args.spread_weight or (args.sigma_weight and norm.sites == FINAL))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The loss, and in training the auxiliary terms."""
        if num_items_in_batch is not None:  # none in the whole step: a zero, not 0 / 0
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        if not model.training or not self._terms:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        terms = dict(self._auxiliary(inputs["input_ids"], inputs.get("attention_mask")))
        if self._explodes(terms.get("spread")):
            self._exploded += 1  # no backward through what is infinite: it would be 0 * inf
            loss = sum(0.0 * p.sum() for p in model.parameters() if p.requires_grad)
            terms.clear()
        share = self._share(inputs, num_items_in_batch)
        for name, term in terms.items():
            self._terms[name].append(term.detach())
            loss = loss + self._weights[name] * share * term
        return (loss, outputs) if return_outputs else loss

    def _explodes(self, term: Tensor | None) -> bool:
        limit = self.args.spread_limit
        if term is None or limit == math.inf or bool(term < limit):
            return False
        return any(site.share for site in sites(self.model))

    def _auxiliary(self, ids: Tensor, mask: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """The auxiliary terms of a forward pass, from the divisors that its norms measured."""
        mask = mask if mask is not None and mask.ndim == 2 else None
        spreads = {}
        for norm in fake_norms(self.model).values():
            if norm.recorded_sigma is not None:
                spreads[norm.sites], norm.recorded_sigma = norm.recorded_sigma.reshape(ids.shape), None
        if "sigma" in self._terms:
            end = self.model.config.get_text_config().eos_token_id
            yield "sigma", sigma_term(spreads[FINAL], ids, mask, end)
        if "spread" in self._terms:
            if not any(spread.requires_grad for names, spread in spreads.items() if names != FINAL):
                raise ValueError(
                    f"spread_weight is {self.args.spread_weight}, but no norm within a layer has a gradient: train"
                    " layers, and with checkpointing set gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            yield "spread", spread_term(list(spreads.values()), mask)

    def _share(self, inputs: dict[str, Any], num_items: Tensor | None) -> Tensor:
        """The part of the step's labels that a forward pass has, as its loss has been scaled; 0 if there are none."""
        labels = inputs.get("shift_labels")
        labels = next_token_labels(inputs["labels"]) if labels is None else token_ids(labels)
        count = (labels != -100).sum()
        if num_items is None:
            return count.clamp(max=1)
        share = count / num_items
        return share * self.accelerator.num_processes if self.args.average_tokens_across_devices else share

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what is left to be removed, and the auxiliary terms."""
        if "loss" in logs:
            logs["norms"] = sum(not site.removed for site in sites(self.model))
            for name, terms in self._terms.items():
                total, count = self._sums_over_processes(sum(map(float, terms)), len(terms))
                terms.clear()
                if count:
                    logs[f"loss_{name}"] = total / count
            if self.args.spread_limit < math.inf:
                (exploded,) = self._sums_over_processes(self._exploded)
                logs["exploded"], self._exploded = int(exploded), 0
        super().log(logs, start_time)

    def _sums_over_processes(self, *values: float) -> list[float]:
        own = torch.tensor(values, device=self.accelerator.device)
        found: Any = self.accelerator.reduce(own, reduction="sum")
        return [float(x) for x in found]

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As transformers, among evaluations without norms: a better one before is not what training is for."""
        if any(not site.removed for site in sites(self.model)):
            return False
        return super()._determine_best_metric(metrics, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers, and a card beside it unless there is one: a stock class would put the norms back."""
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        if not _internal_call and self.is_world_process_zero() and not (folder / "README.md").exists():
            write_card(self, folder, folder.name)


def sigma_term(spread: Tensor, ids: Tensor, mask: Tensor | None, end: int | list[int] | None) -> Tensor:
    """mean (sigma_t - sigma*)^2 of divisors [B, T] over tokens that are no padding; `end`: end-of-text ids."""
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    kept = spread[keep]
    if not kept.numel():
        return kept.sum()
    first = keep & (keep.cumsum(-1) == 1)
    ends = torch.tensor([] if end is None else end, device=ids.device).reshape(-1)
    usual = keep & ~first & ~torch.isin(ids, ends)
    target = spread.detach()[usual if bool(usual.any()) else keep].mean()
    return (kept - target).square().mean()


def spread_term(spreads: list[Tensor], mask: Tensor | None) -> Tensor:
    """Mean over norms of the variance of log sigma_t, divisors [B, T] each, over tokens that are no padding."""
    logs = torch.stack([spread.to(spreads[0].device) for spread in spreads]).log()
    logs = logs.flatten(1) if mask is None else logs[:, mask.bool()]
    return logs.var(-1, correction=0).mean() if logs.numel() else logs.sum()

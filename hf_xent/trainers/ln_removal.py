"""Fine-tuning that removes a model's norms one by one (see `hf_xent.ln_free`), on the loss without logits.

    loss = cross-entropy + lambda mean_t (sigma_t - sigma*)^2 + mu mean_n Var_t log sigma_n,t

sigma_t is the divisor of the final norm at a token, before or after its removal; sigma*, a constant, is its mean over
the tokens that are neither the first of a sequence nor an end of text. So the divisors of exactly these two kinds are
pulled towards that of the others, which is to serve for all. The mean is over the tokens of a forward pass that are not
padding; a pass of padding alone has a term of zero. Under accumulation a pass counts by its share of the step's labels,
so one without labels does not count.

mu, 0 by default, is our addition: it makes the divisors of every norm n alike, removed or not, whatever their size. It
is for models with massive activations, where a first token's residual is many times as long as the others' and one
divisor cannot serve both (in SmolLM2-135M 170 times, and a gated MLP squares it); removals then start once the term has
fallen. After that, a pass whose term is above `spread_limit` is left out: the hidden state of one of its tokens has
exploded, growing from one gated MLP to the next, and its gradient would destroy the model.

Removals happen at the beginning of their steps. The removals and every sigma are buffers of the model, so a run that
resumes from a checkpoint in the middle of the schedule continues as if it had not stopped. lambda 0.1 is the authors'
for the two smaller sizes; `hf_xent.trainers.ln_recipes` has their numbers by size.

Source: Baroni et al. 2025, arXiv:2507.02559, with the authors' code, github.com/submarat/removing-layer-norm.
Data: as for `XentTrainer`; with padding, an `attention_mask`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..hub import write_card
from ..ln_free.norms import fake_norms
from ..ln_free.removal import FINAL, sites
from ..ln_free.schedule import Schedule
from ..ln_free.wrapping import wrap
from ..patching import head_of
from .batches import targets
from .ln_schedule import LNRemovalCallback, RemovalOptions
from .refusals import refuse_encoder_decoder
from .xent import XentConfig, XentTrainer


@dataclass
class LNRemovalConfig(RemovalOptions, XentConfig):
    """`XentConfig` and the options of norm removal; the defaults are the authors' for the two smaller sizes of GPT-2.

    Raises:
        ValueError: A field has a value out of its range or of another type.
    """

    ranges: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("sigma_weight", "spread_weight"), "[0, inf)"),
        "spread_limit": "(0, inf]",
        "sigma_momentum": "[0, 1]",
    }

    sigma_weight: float = field(default=0.1, metadata={"help": "lambda, the weight of the sigma term; 0 is a control."})
    spread_weight: float = field(
        default=0.0,
        metadata={
            "help": "mu, the weight of the variance of the logarithms of every norm's divisors: 100 for models with"
            " massive activations."
        },
    )
    spread_limit: float = field(
        default=math.inf,
        metadata={
            "help": "Once removal has begun, a forward pass with a larger variance is left out: the hidden state of one"
            " of its tokens has exploded. 0.05 for models with massive activations."
        },
    )
    sigma_momentum: float = field(default=0.9, metadata={"help": "Momentum of every norm's running sigma."})
    sigma_median: bool = field(
        default=False,
        metadata={
            "help": "Sigma follows the median of the tokens' divisors, not their mean: for models with massive"
            " activations, where one token can explode."
        },
    )


def check_options(args: LNRemovalConfig) -> None:
    """Raises: ValueError for options that would have no effect, or another than the intended one."""
    if args.spread_limit < math.inf and not args.spread_weight:
        raise ValueError(
            f"spread_limit is {args.spread_limit} but spread_weight is 0: set both, the limit is one of that term"
        )
    if args.use_liger_kernel:
        raise ValueError("use_liger_kernel is True, but Liger would replace the removable norms: set it to False")
    if args.neftune_noise_alpha:
        raise ValueError(
            f"neftune_noise_alpha is {args.neftune_noise_alpha}, but the sigmas would be frozen at those of noisy"
            " embeddings, which exist in training only: set it to None"
        )


class LNRemovalTrainer(XentTrainer):
    """Fine-tunes a causal LM until its norms are gone; see the module's docstring and `XentTrainer`.

        loss = cross-entropy + lambda mean_t (sigma_t - sigma*)^2 + mu mean_n Var_t log sigma_n,t

    Logged: `norms`, how many sites are left, `loss_sigma` and `loss_spread`, the auxiliary terms before their weights,
    means over forward passes since the last log, and `exploded`, how many of these were left out if there is a limit;
    all of them over all processes. Evaluation is the loss alone. Only evaluations without norms compete to be the best,
    and so do their checkpoints for `load_best_model_at_end`.

    A saved model has what training resumes from: stock weights, sigmas and removals. `hf_xent.ln_free.load` reads it; a
    stock class would normalize again, so `save_model` and `push_to_hub` write a card that says so.

    Args:
        model: A causal LM with norms that `hf_xent.ln_free` knows. It is wrapped and patched.
        args: The configuration; `LNRemovalConfig(output_dir="out")` if it is left out.
        schedule: When each norm is removed; it takes precedence over `args.schedule`.
        **kwargs: As for `XentTrainer`.

    Raises:
        ValueError: A model whose norms cannot be removed, an option that would have no effect, and, in training, a
            schedule that does not fit model or steps, or `spread_weight` under reentrant checkpointing.

    Source: Baroni et al. 2025, arXiv:2507.02559; mu is ours.
    """

    config_class = LNRemovalConfig
    args: LNRemovalConfig
    means = ("loss_sigma", "loss_spread")
    counts = ("exploded",)
    splits_sequences = False

    def __init__(
        self, model: Any, args: LNRemovalConfig | None = None, *, schedule: Schedule | None = None, **kwargs: Any
    ):
        args = self.configured(args, kwargs)
        args.check_schedule(schedule)
        check_options(args)
        refuse_encoder_decoder(model)
        head_of(model)  # raises for a model that is not a language model
        wrap(model, momentum=args.sigma_momentum, median=args.sigma_median)
        if args.sigma_weight and all(norm.sites != FINAL for norm in fake_norms(model).values()):
            raise ValueError(
                f"sigma_weight is {args.sigma_weight}, a weight of the norm before the head, which"
                f" {type(model).__name__} does not have: set it to 0"
            )
        super().__init__(model, args, **kwargs)
        self.add_callback(LNRemovalCallback(schedule))
        weights = {"sigma": args.sigma_weight, "spread": args.spread_weight}
        self._weights = {name: weight for name, weight in weights.items() if weight}
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
        if num_items_in_batch is not None:  # without labels in the whole step the loss is 0, not 0 / 0
            items = torch.as_tensor(num_items_in_batch)
            num_items_in_batch = torch.where(items == 0, 1, items)  # weights of labels may add up to less than 1
        if not model.training or not self._weights:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        terms = dict(self._auxiliary(inputs["input_ids"], inputs.get("attention_mask")))
        explodes = self._explodes(terms.get("spread"))
        if self.args.spread_limit < math.inf:
            self._note("exploded", float(explodes))
        if explodes:  # a backward through infinite values would give 0 * inf
            loss = sum(0.0 * p.sum() for p in model.parameters() if p.requires_grad)
            terms.clear()
        share = self._share(inputs, num_items_in_batch)
        for name, term in terms.items():
            self._note(f"loss_{name}", term)
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
        if "sigma" in self._weights:
            end = self.model.config.get_text_config().eos_token_id
            yield "sigma", sigma_term(spreads[FINAL], ids, mask, end)
        if "spread" in self._weights:
            if not any(spread.requires_grad for names, spread in spreads.items() if names != FINAL):
                raise ValueError(
                    f"spread_weight is {self.args.spread_weight}, but no norm within a layer has a gradient: train"
                    " layers, and with checkpointing set gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            yield "spread", spread_term(list(spreads.values()), mask)

    def _share(self, inputs: dict[str, Any], num_items: Tensor | None) -> Tensor:
        """The share of the step's labels that a forward pass has, scaled as its loss is; 0 without labels."""
        count = (targets(inputs) != -100).sum()
        if num_items is None:
            return count.clamp(max=1)
        return count / num_items * self._averaged_by

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds how many norms are left, and the auxiliary terms."""
        if "loss" in logs:
            logs["norms"] = sum(not site.removed for site in sites(self.model))
        super().log(logs, start_time)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As transformers, but only among evaluations without norms: a better model with norms is not the goal."""
        if any(not site.removed for site in sites(self.model)):
            return False
        return super()._determine_best_metric(metrics, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers; also writes a card unless there is one, as a stock class would put the norms back."""
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        if not _internal_call and self.is_world_process_zero() and not (folder / "README.md").exists():
            write_card(self, folder, folder.name)


def sigma_term(spread: Tensor, ids: Tensor, mask: Tensor | None, end: int | list[int] | None) -> Tensor:
    """mean (sigma_t - sigma*)^2 of divisors [B, T] over tokens that are not padding; `end`: end-of-text ids."""
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
    """Mean over norms of the variance of log sigma_t, divisors [B, T] each, over tokens that are not padding."""
    logs = torch.stack([spread.to(spreads[0].device) for spread in spreads]).log()
    logs = logs.flatten(1) if mask is None else logs[:, mask.bool()]
    return logs.var(-1, correction=0).mean() if logs.numel() else logs.sum()

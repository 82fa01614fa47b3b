"""Path nucleus: k paths of a prompt are sampled together, in one nucleus over the pairs of a path and its next token.

    l_j = sum log p / length^penalty      W = softmax(l)      J[j, v] = W_j p(v | path j)      j = 1 ... k live paths

Each step keeps the smallest set of pairs (j, v) of mass >= top_p, renormalizes it, and draws k pairs from it without
replacement (Gumbel top-k), which are the paths of the next step. A path that has ended is one pair of mass W_j, and
keeps l_j. Where the nucleus has fewer pairs than k, fewer paths live, until a later nucleus has more. Paths of a prompt
differ from each other; l is the model's own, not corrected for how the paths were drawn. k = 1 is top-p sampling.

Gumbel noise that is fresh at every step draws pairs without replacement, not sequences: only the first step has the
exact inclusion probabilities. `stochastic_beam=True` draws k sequences of the whole model without replacement: a path's
noise is the maximum of its continuations' (G of the path, log-probability phi), and kappa the largest that was dropped:

    G'_v ~ Gumbel(phi_v)      Z = max_v G'_v      G_v = -log(exp(-G) - exp(-Z) + exp(-G'_v))

Sums of p / q over the k sequences, q = 1 - exp(-exp(phi - kappa)), are unbiased estimates of sums of p over all.

This file imports nothing of hf_xent but its neighbour `decoding`: it is also the `custom_generate/generate.py` of a Hub
repository (`export`).

Source: Li, Li 2024, arXiv:2409.19790, whose sampling over accumulated path probabilities is described without formulas
or measurements; the formulas above are one reading. Stochastic beams: Kool, van Hoof, Welling 2019, arXiv:1903.06059.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .decoding import KEPT, reduced, settled, written

CACHES = ("cache", "past_key_values", "cache_params")  # names of transformers' models for their cache
MOST = 2**24  # categories that torch.multinomial takes
OUTPUTS = ("streamer", "output_scores", "output_logits", "output_attentions", "output_hidden_states")
REFUSED = dict.fromkeys(OUTPUTS, "only whole paths and their weights are returned: leave it out") | {
    "guidance_scale": "its cache of other prompts does not follow paths: leave it out",
    "stop_strings": "`generate` gives a loop no tokenizer: pass a StopStringCriteria in stopping_criteria",
}


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def nucleus(log_joint: Tensor, top_p: float) -> Tensor:
    """Which pairs [B, k, V] are in the smallest set of mass >= top_p, for each prompt; at least one pair.

    Args:
        log_joint: Log-probabilities [B, k, V] of pairs of a path and a token, nats; -inf for none.
        top_p: The mass to keep, in (0, 1].
    """
    ascending, order = log_joint.flatten(1).softmax(-1).sort(dim=-1)
    keep = ascending.cumsum(-1) > 1 - top_p
    keep[:, -1] = True
    return torch.zeros_like(keep).scatter_(1, order, keep).view(log_joint.shape)


def conditioned(phi: Tensor, maximum: Tensor) -> Tensor:
    """Gumbel noise [B, k, V] of location phi [B, k, V], given its maximum [B, k] over the last dimension."""
    drawn = phi - torch.empty_like(phi).exponential_().log()
    below = drawn - drawn.amax(-1, keepdim=True)
    v = maximum[..., None] - drawn + torch.log(-torch.expm1(below))  # appendix B.3 of Kool et al.
    noise = maximum[..., None] - v.clamp(min=0) - torch.log1p(torch.exp(-v.abs()))
    return torch.where(phi.isfinite(), noise, -torch.inf)


@dataclass
class PathsOutput(ModelOutput):
    """The result with `return_dict_in_generate=True`; a row without a path is the prompt and padding, of weight 0."""

    sequences: Tensor | None = None  # token ids [B n, T]
    weights: Tensor | None = None  # [B n]; they sum to 1 over the k paths of a prompt: softmax of l, or of log p / q
    log_probs: Tensor | None = None  # log-probabilities [B n] of the new tokens, nats, under the tempered model
    log_importance: Tensor | None = None  # log p / q [B n], for stochastic beams


@dataclass
class _Live:
    """The paths of a batch [B, k]."""

    log_probs: Tensor
    lengths: Tensor
    ended: Tensor
    noise: Tensor  # perturbed log-probabilities G, for stochastic beams
    dropped: Tensor  # kappa [B]

    @classmethod
    def roots(cls, prompts: int, paths: int, device: torch.device) -> _Live:
        """One path of no tokens for each prompt; the other rows are dead."""
        wide = torch.float32 if device.type == "mps" else torch.float64
        log_probs = torch.full((prompts, paths), -torch.inf, dtype=wide, device=device)
        log_probs[:, 0] = 0
        lengths, ended = torch.zeros_like(log_probs), torch.zeros_like(log_probs, dtype=torch.bool)
        return cls(log_probs, lengths, ended, log_probs, torch.full_like(log_probs[:, 0], -torch.inf))

    def follow(self, parents: Tensor, added: Tensor, alive: Tensor) -> None:
        """Go on with the pairs of these parents [B, k] and log-probabilities [B, k] of tokens."""
        going = ~self.ended.gather(1, parents)
        self.log_probs = torch.where(alive, self.log_probs.gather(1, parents) + added, -torch.inf)
        self.lengths = self.lengths.gather(1, parents) + going
        self.ended = ~going | ~alive


@dataclass
class PathNucleus:
    """The decoding loop of `generate`, as a `custom_generate` callable of transformers: rows [B k] in, [B rows] out.

    Raises: ValueError if an option is outside its range or has no effect.
    """

    paths: int = 4
    top_p: Any = None  # a number: 0.9, or 1 for stochastic beams
    temperature: float = 1.0
    length_penalty: float = 0.0
    stochastic_beam: bool = False
    rows: int = 1

    def __post_init__(self) -> None:
        self.top_p = (1.0 if self.stochastic_beam else 0.9) if self.top_p is None else self.top_p
        for name, valid, remedy in (
            ("paths", _is_number(self.paths) and self.paths >= 1 and self.paths % 1 == 0, "a whole number from 1 on"),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("temperature", _is_number(self.temperature) and self.temperature > 0, "a positive number"),
            ("length_penalty", _is_number(self.length_penalty) and self.length_penalty >= 0, "a number in [0, inf)"),
            ("stochastic_beam", isinstance(self.stochastic_beam, bool), "True or False"),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose {remedy}")
        self.paths = int(self.paths)
        for name, neutral in (("top_p", 1), ("length_penalty", 0)):
            if self.stochastic_beam and getattr(self, name) != neutral:
                raise ValueError(f"{name} is given, but stochastic beams are of the whole model: leave it out")
        if not 1 <= self.rows <= self.paths:
            raise ValueError(f"num_return_sequences is {self.rows}, paths {self.paths}: choose at most {self.paths}")

    def __call__(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
        **model_kwargs: Any,
    ) -> PathsOutput | Tensor | None:  # fmt: skip
        """The loop; arguments and options are those of transformers' own, `GenerationMixin._sample`."""
        ids, is_encoder_decoder = input_ids, model.config.is_encoder_decoder
        pad = generation_config._pad_token_tensor  # of `generate`: an end token if there is no other
        if pad is None:
            raise ValueError("pad_token_id is None, but paths that end are padded: give one")
        live = _Live.roots(len(ids) // self.paths, self.paths, ids.device)
        if self.stochastic_beam:
            live.noise = live.noise - torch.empty_like(live.noise).exponential_().log()
        first = torch.arange(0, len(ids), self.paths, device=ids.device)[:, None]  # row of each prompt
        outputs = model._prefill(ids, generation_config, model_kwargs)
        while True:
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder)
            # a copy: a part of the logits would keep all of them alive
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=ids.device)
            del outputs
            scores = logits_processor(ids, logits) / self.temperature
            parents, tokens = self._step(live, scores.log_softmax(-1), int(pad))
            rows = (first + parents).flatten()
            ids = torch.cat([ids[rows], tokens.view(-1, 1)], -1)
            live.ended |= stopping_criteria(ids, None).view_as(live.ended)
            if live.ended.all():  # dead rows, too
                output = self._result(live, ids, first, input_ids.shape[1], int(pad))
                return output if generation_config.return_dict_in_generate else output.sequences
            _reorder(model, model_kwargs, rows)
            new = 1 if model_kwargs.get("use_cache") else None
            inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=new, **model_kwargs)
            outputs = model(**inputs, return_dict=True)

    def _step(self, live: _Live, logp: Tensor, pad: int) -> tuple[Tensor, Tensor]:
        """Draws the next pairs by logp [B k, V]; returns their parents and tokens [B, k], and updates `live`."""
        size = logp.shape[-1]
        if self.paths * size > MOST:
            raise ValueError(f"paths is {self.paths} with {size} tokens: choose at most {MOST // size}")
        logp = logp.view(*live.ended.shape, size)
        certain = torch.full_like(logp[0, 0], -torch.inf).index_fill_(0, torch.tensor(pad, device=logp.device), 0.0)
        logp = torch.where(live.ended[..., None], certain, logp)
        draw = self._draw_sequences if self.stochastic_beam else self._draw_pairs
        chosen, alive = draw(live, logp)
        chosen = torch.where(alive, chosen, chosen[:, :1])  # dead rows repeat the first, which is alive
        parents = chosen // size
        live.follow(parents, logp.flatten(1).gather(1, chosen), alive)
        return parents, chosen % size

    def _draw_pairs(self, live: _Live, logp: Tensor) -> tuple[Tensor, Tensor]:
        """Indices [B, k] of pairs of the nucleus, and whether there are so many."""
        joint = self._log_weights(live).to(logp.dtype)[..., None] + logp
        probs = joint.masked_fill_(~nucleus(joint, self.top_p), -torch.inf).flatten(1).softmax(-1)
        chosen = torch.multinomial(probs, self.paths)  # without replacement, which torch does by Gumbel top-k
        return chosen, probs.gather(1, chosen) > 0

    def _draw_sequences(self, live: _Live, logp: Tensor) -> tuple[Tensor, Tensor]:
        """Indices [B, k] of the pairs of the largest noise, and whether there are so many."""
        noise = conditioned(live.log_probs[..., None] + logp, live.noise)
        top, chosen = noise.flatten(1).topk(self.paths + 1)
        live.noise, live.dropped = top[:, :-1], torch.maximum(live.dropped, top[:, -1])
        return chosen[:, :-1], live.noise > -torch.inf

    def _log_weights(self, live: _Live) -> Tensor:
        """log W [B, k]."""
        return (live.log_probs / live.lengths.clamp(min=1) ** self.length_penalty).log_softmax(-1)

    def _result(self, live: _Live, ids: Tensor, first: Tensor, start: int, pad: int) -> PathsOutput:
        """The best rows of every prompt, cropped to the longest of them."""
        log_weights, importance = self._log_weights(live), None
        if self.stochastic_beam:
            q = -torch.expm1(-torch.exp(live.log_probs - live.dropped[:, None]))
            importance = torch.where(live.log_probs.isfinite(), live.log_probs - q.log(), -torch.inf)
            log_weights = importance.log_softmax(-1)
        best = log_weights.argsort(stable=True, dim=-1, descending=True)[:, : self.rows]
        taken = (first + best).flatten()
        is_path = log_weights.gather(1, best).flatten().isfinite()
        length = start + int(live.lengths.flatten()[taken][is_path].max())
        ids = ids[taken, :length]
        ids[:, start:].masked_fill_(~is_path[:, None], pad)
        kept = [x if x is None else x.flatten()[taken].float() for x in (log_weights.exp(), live.log_probs, importance)]
        return PathsOutput(ids, *kept)


def _reorder(model: Any, model_kwargs: dict[str, Any], rows: Tensor) -> None:
    """Puts the rows [B k] of the cache where their paths are now. Raises: ValueError if the cache has no such way."""
    if torch.equal(rows, torch.arange(len(rows), device=rows.device)):
        return
    name = next((name for name in CACHES if model_kwargs.get(name) is not None), None)
    if name is not None and hasattr(model, "_reorder_cache"):
        model_kwargs[name] = model._reorder_cache(model_kwargs[name], rows)
    elif name is not None and hasattr(model_kwargs[name], "reorder_cache"):
        model_kwargs[name].reorder_cache(rows)
    elif name is not None or getattr(model, "_is_stateful", False):
        raise ValueError(f"paths is above 1, but {type(model).__name__} has a state that cannot be reordered: choose 1")


def generate(model: Any, inputs: Tensor | None = None, **options: Any) -> Any:
    """`model.generate` with path nucleus sampling.

    As with beams, `num_return_sequences` rows are returned for each prompt, those of the largest weights, 1 by default
    and at most `paths`. Other options that decide which token is sampled (top_k, num_beams, assisted decoding ...) are
    switched off in the model's generation configuration, and refused as arguments; penalties and forbidden tokens act
    before the nucleus. The noise is that of torch's default generator.

    Args:
        model: A causal LM of transformers, or an encoder and decoder.
        inputs: Token ids [B, T], as for `model.generate`.
        **options: Those of `model.generate`, and `paths` (k, 4 by default), `top_p` (0.9), `temperature` of the
            softmax, before everything else (1), `length_penalty` (0), `stochastic_beam` (False; it has no nucleus).

    Returns:
        Token ids [B num_return_sequences, T], or a `PathsOutput` with `return_dict_in_generate=True`.

    Raises:
        ValueError: An option samples tokens in another way, is outside its range or has no effect.
    """
    names = ("paths", "top_p", "temperature", "length_penalty", "stochastic_beam")
    settings = {name: value for name in names if (value := options.pop(name, None)) is not None}
    config, options = settled(model, "Path nucleus", options)
    decode = PathNucleus(**settings, rows=config.num_return_sequences or 1)
    for name, reason in REFUSED.items():
        if options.get(name) or getattr(config, name, None):
            raise ValueError(f"{name} is given, but {reason}")
    config.num_return_sequences = decode.paths  # the rows of each prompt
    with reduced(model.generation_config, KEPT):
        # of the class: on a model loaded from a repository like `export`'s, the instance's `generate` is this function
        return type(model).generate(model, inputs, generation_config=config, custom_generate=decode, **options)


def export(folder: str | Path) -> Path:
    """Writes a `custom_generate` repository for the Hub: this file, `decoding.py` and a card; returns the folder.

    `model.generate(ids, custom_generate=FOLDER_OR_REPO, trust_remote_code=True, paths=4)` then samples with it.
    """
    return written(folder, __file__, CARD)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [custom_generate, hf_xent]
---

# Path nucleus sampling

Samples `paths` continuations of a prompt together: one nucleus over all pairs of a path and its next token, weighted by
the paths' probabilities (after arXiv:2409.19790, which reports no measurements). `stochastic_beam=True` draws sequences
without replacement (arXiv:1903.06059). For any causal LM `model` and its tokenizer's `inputs`:

<!-- loads . -->
```python
ids = model.generate(**inputs, custom_generate=".", trust_remote_code=True, paths=4, top_p=0.9, max_new_tokens=200)
```

`num_return_sequences` rows come back for each prompt, 1 by default, the largest weight first, and their `weights` with
`return_dict_in_generate=True`. More options: `temperature`, `length_penalty`. Code: `hf_xent.generation.paths`.
"""

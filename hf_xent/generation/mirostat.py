"""Mirostat: sampling that holds the surprise of the sampled tokens at a target, as a logits processor of `generate`.

    S(x) = -log2 p(x)        mu <- mu - rate (S(x) - target)        mu_0 = 2 target, bits, one mu per sequence

Version 2 keeps the tokens with -log2 p <= mu, at least one. Version 1 keeps the k likeliest, by a Zipf law fitted to
the first 100 probabilities p_(1) >= p_(2) >= ... (s by least squares on their log ratios, e = s - 1, V tokens):

    s = sum_i t_i b_i / sum_i t_i^2     t_i = log((i + 1) / i)     b_i = log(p_(i) / p_(i+1))     i = 1 ... 99
    k = (e 2^mu / (1 - V^-e))^(1 / s)   and (2^mu / log V)^(1 / s) for s = 1; rounded, within 1 ... V

S is the surprise under the whole model, as in the paper; `surprise="truncated"` takes that under the truncated
distribution, as llama.cpp does (with target 5 and rate 0.1). `temperature` acts before everything else, and S is then
the surprise under the tempered model. A target above the model's entropy cannot be reached, nor one below the surprise
of greedy decoding.

This file imports nothing of hf_xent but its neighbour `decoding`: it is also the `custom_generate/generate.py` of a Hub
repository (`export`).

Source: Basu, Ramachandran, Keskar, Varshney 2021, Mirostat, arXiv:2007.14966, algorithm 1; version 2 is its section 5b.
"""

from __future__ import annotations

import math
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from .decoding import KEPT, reduced, settled, written

FITTED = 100  # the number of probabilities to which the Zipf law is fitted


class Mirostat(LogitsProcessor):
    """Holds the surprise of every sequence of a batch at `target` bits; see the module's docstring.

    For `model.generate(..., logits_processor=[Mirostat(3.0)], do_sample=True, top_k=0, top_p=1.0)`; without the last
    two, transformers keeps only the 50 likeliest tokens after it; `generate` of this module sets them. One object
    serves one call at a time: it starts again when the sequences do not continue those of the step before. It does not
    work with beams or assisted decoding, which reorder or skip tokens. `mu` [B] is the current bound, `observed` the
    surprises [B] of each step, nan for a sequence that has ended.

    Args:
        target: The surprise to hold, bits.
        rate: Step size of mu.
        version: 1 keeps the k likeliest tokens, 2 those of at most mu bits.
        surprise: 'full', under the whole model, or 'truncated', under the truncated distribution.
        temperature: Temperature of the softmax, before everything else.
        eos: The tokens that end a sequence.

    Raises:
        ValueError: An option is outside its range.
    """

    supports_continuous_batching = False  # rows would come and go between steps

    def __init__(
        self,
        target: float = 3.0,
        rate: float = 1.0,
        *,
        version: int = 2,
        surprise: str = "full",
        temperature: float = 1.0,
        eos: int | list[int] | None = None,
    ):
        positive: dict[str, Any] = {"target": target, "rate": rate, "temperature": temperature}
        for name, value in positive.items():
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
                raise ValueError(f"{name} is {value!r}: choose a positive number")
        if isinstance(version, bool) or version not in (1, 2) or surprise not in ("full", "truncated"):
            raise ValueError(
                f"version is {version!r}, surprise {surprise!r}: choose version 1 or 2, surprise 'full' or 'truncated'"
            )
        self.target, self.rate, self.version = target, rate, version
        self.surprise, self.temperature = surprise, temperature
        self.eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        self.mu = torch.empty(0)
        self.observed: list[Tensor] = []
        self._ids: Tensor | None = None  # those of the step before, and the log-probabilities of its token
        self._logp: Tensor | None = None
        self._ended = torch.empty(0, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Updates mu with the last tokens [B]; returns scores [B, V] with -inf at tokens that must not be sampled."""
        if self._continues(input_ids):
            self._observe(input_ids[:, -1])
        else:
            self.mu = scores.new_full((len(scores),), 2 * self.target, dtype=torch.float32)
            self._ended = torch.zeros_like(self.mu, dtype=torch.bool)
            self.observed = []
        logp = (scores.float() / self.temperature).log_softmax(-1)
        keep = by_surprise(logp, self.mu) if self.version == 2 else by_zipf(logp, self.mu)
        kept = logp.masked_fill(~keep, -torch.inf)
        self._ids = input_ids
        self._logp = logp if self.surprise == "full" else kept.log_softmax(-1)
        return kept.to(scores.dtype)

    def _continues(self, ids: Tensor) -> bool:
        """Whether these are the sequences of the step before, one token longer."""
        before = self._ids
        return before is not None and ids[:, :-1].shape == before.shape and bool((ids[:, :-1] == before).all())

    def _observe(self, token: Tensor) -> None:
        assert self._logp is not None
        surprise = -self._logp.gather(-1, token[:, None]).squeeze(-1) / math.log(2)
        self.observed.append(torch.where(self._ended, torch.nan, surprise))
        self.mu = torch.where(self._ended, self.mu, self.mu - self.rate * (surprise - self.target))
        self._ended |= torch.isin(token, torch.tensor(self.eos, dtype=token.dtype, device=token.device))


def by_surprise(logp: Tensor, mu: Tensor) -> Tensor:
    """Version 2: which tokens [B, V] of log-probabilities [B, V], nats, have at most mu [B] bits of surprise."""
    return (logp >= -mu[:, None] * math.log(2)) | (logp == logp.amax(-1, keepdim=True))


def by_zipf(logp: Tensor, mu: Tensor) -> Tensor:
    """Version 1: which tokens [B, V] are among the k likeliest; tokens of probability 0 are left out of the fit."""
    ordered, order = logp.sort(stable=True, dim=-1, descending=True)
    top = ordered[:, : min(FITTED, logp.shape[-1])].double()
    t = torch.arange(1, top.shape[-1], device=logp.device).double()
    t = ((t + 1) / t).log()
    valid = top[:, 1:].isfinite()
    b = torch.where(valid, top[:, :-1] - top[:, 1:], 0.0)
    s = ((t * b).sum(-1) / (t**2 * valid).sum(-1).clamp(min=1e-9)).clamp(min=1e-3)  # equal probabilities: k is 1 or V
    k = zipf_k(s, mu.double(), logp.shape[-1])
    rank = torch.arange(logp.shape[-1], device=logp.device)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, rank < k[:, None])


def zipf_k(s: Tensor, mu: Tensor, vocabulary: int) -> Tensor:
    """k [B] of version 1 for exponents s [B] and bounds mu [B], in logarithms: 2^mu and V^-e may overflow."""
    e, log_v = s - 1, math.log(vocabulary)
    near_zero = e.abs() < 1e-6
    safe = torch.where(near_zero, 1.0, e)
    ratio = torch.where(near_zero, 1 / log_v, safe / -torch.expm1(-safe * log_v))  # e / (1 - V^-e), always positive
    log_k = (ratio.log() + mu * math.log(2)) / s
    return log_k.clamp(max=log_v).exp().round().clamp(1, vocabulary)


def generate(model: Any, inputs: Tensor | None = None, **options: Any) -> Any:
    """`model.generate` with Mirostat sampling.

    Other options that decide which token is sampled (top_k, top_h, num_beams, assisted decoding, watermarks ...) are
    switched off in the model's generation configuration, and refused as arguments; penalties and forbidden tokens act
    before Mirostat.

    Args:
        model: A causal LM of transformers.
        inputs: Token ids [B, T], as for `model.generate`.
        options: Those of `model.generate`, and `target`, `rate`, `version`, `surprise`, `temperature` of `Mirostat`.

    Returns:
        The result of `model.generate`.

    Raises:
        ValueError: An option samples tokens in another way, or is outside its range.
    """
    names = ("target", "rate", "version", "surprise", "temperature")
    settings = {name: options.pop(name) for name in names if options.get(name) is not None}
    config, options = settled(model, "Mirostat", options)
    ends = model.generation_config.eos_token_id if config.eos_token_id is None else config.eos_token_id
    options["logits_processor"] = [*(options.get("logits_processor") or ()), Mirostat(**settings, eos=ends)]
    with reduced(model.generation_config, KEPT):
        # of the class: on a model loaded from a repository like `export`'s, the instance's `generate` is this function
        return type(model).generate(model, inputs, generation_config=config, **options)


def export(folder: str | Path) -> Path:
    """Writes a `custom_generate` repository for the Hub: this file, `decoding.py` and a card.

    `model.generate(ids, custom_generate=FOLDER_OR_REPO, trust_remote_code=True, target=3.0)` then samples with it.

    Args:
        folder: The folder to write; it is made if it does not exist.

    Returns:
        The folder.
    """
    return written(folder, __file__, CARD)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags:
- custom_generate
- hf_xent
---

# Mirostat sampling

Holds the surprise of every sequence at `target` bits (Basu et al. 2021, arXiv:2007.14966). Version 2 by default.

For any causal LM `model` and its tokenizer's `inputs`:

<!-- loads . -->
```python
ids = model.generate(**inputs, custom_generate=".", trust_remote_code=True, target=3.0, max_new_tokens=200)
```

Options: `target` (bits), `rate`, `version` (1 or 2), `surprise` ("full" or "truncated"), `temperature`. Batches keep
one state per sequence. It does not work with beams or assisted decoding. Code: `hf_xent.generation.mirostat`.
"""

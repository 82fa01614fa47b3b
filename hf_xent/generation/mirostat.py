"""Mirostat: sampling that holds the surprise of the sampled tokens at a target, as a logits processor of `generate`.

    S(x) = -log2 p(x)        mu <- mu - rate (S(x) - target)        mu_0 = 2 target, bits, one mu per sequence

Version 2 keeps the tokens with -log2 p <= mu, at least one. Version 1 keeps the k likeliest, by a Zipf law (`zipf`).

S is the surprise under the whole model, as in the paper; `surprise="truncated"` takes that under the truncated
distribution, as llama.cpp does (with target 5 and rate 0.1). `temperature` acts before everything else, and S is then
the surprise under the tempered model. A target above the model's entropy cannot be reached, nor one below the surprise
of greedy decoding.

This file imports nothing of hf_xent but its neighbours `decoding` and `zipf`: it is also the
`custom_generate/generate.py` of a Hub repository (`export`).

Source: Basu, Ramachandran, Keskar, Varshney 2021, Mirostat, arXiv:2007.14966, algorithm 1; version 2 is its section 5b.
"""

from __future__ import annotations

import math
import warnings
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor

from .decoding import KEPT, reduced, settled, written
from .zipf import by_zipf

PROPOSALS = 64  # of how many last steps the distributions are kept for assisted decoding
DEFAULTS = (1, 50)  # `generate` keeps so many of the likeliest tokens by default: without do_sample, and with it
UNLIKELY = math.log(1e-6)  # the chance under Mirostat of what has been drawn, below which there is a warning
ASSISTANTS = ("assistant_model", "prompt_lookup_num_tokens", "max_matching_ngram_size")  # options, exact if assisted


class Step(NamedTuple):
    """The state of B sequences before a token is drawn, and the distribution that it is drawn from."""

    mu: Tensor  # [B]
    ended: Tensor  # [B]
    logp: Tensor | None  # [B, V], -inf for tokens that may not be drawn; None where it is no longer needed


class Mirostat(LogitsProcessor):
    """Holds the surprise of every sequence of a batch at `target` bits; see the module's docstring.

    For `model.generate(..., logits_processor=[Mirostat(3.0)], do_sample=True, top_k=0, top_p=1.0)`; without the last
    three, transformers takes the likeliest token, or one of the 50 likeliest, after it: a warning says so as soon as
    that is all but certain. `generate` of this module sets them. One object serves one call: it starts again when the
    sequences are new. `mu` [B] is the current bound, `observed` the surprises [B] of each step, nan for a sequence that
    has ended.

    Beams reorder sequences, and contrastive search takes tokens that are ruled out: both are refused when they do it.
    Assisted decoding proposes tokens and goes back where they are rejected; with `assisted` the state goes back too, so
    every token is accepted or drawn under the distribution that plain Mirostat has after the same tokens.

    Args:
        target: The surprise to hold, bits; or a list or tensor [B] of one for each sequence.
        rate: Step size of mu; or one for each sequence.
        version: 1 keeps the k likeliest tokens, 2 those of at most mu bits.
        surprise: 'full', under the whole model, or 'truncated', under the truncated distribution.
        temperature: Temperature of the softmax, before everything else.
        eos: The tokens that end a sequence.
        assisted: Whether the call has an assistant model or looks tokens up in the prompt. The distributions of the
            last 64 steps are kept then.

    Raises:
        ValueError: An option is outside its range; or, while generating, sequences are not those that it sampled.
    """

    supports_continuous_batching = False  # rows would come and go between steps

    def __init__(
        self,
        target: float | list[float] | Tensor = 3.0,
        rate: float | list[float] | Tensor = 1.0,
        *,
        version: int = 2,
        surprise: str = "full",
        temperature: float = 1.0,
        eos: int | list[int] | None = None,
        assisted: bool = False,
    ):
        if isinstance(version, bool) or version not in (1, 2) or surprise not in ("full", "truncated"):
            raise ValueError(
                f"version is {version!r}, surprise {surprise!r}: choose version 1 or 2, surprise 'full' or 'truncated'"
            )
        if not isinstance(assisted, bool):
            raise ValueError(f"assisted is {assisted!r}: choose True or False")
        self.target, self.rate = positive("target", target), positive("rate", rate)
        if isinstance(number := positive("temperature", temperature), list):
            raise ValueError(f"temperature is {temperature!r}: choose a positive number")
        self.version, self.surprise, self.temperature = version, surprise, number
        self.eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        self.assisted = assisted
        self.mu = torch.empty(0)
        self.observed: list[Tensor] = []
        self._ids: Tensor | None = None  # of the last step
        self._first = 0  # the length of the sequences in the first step
        self._steps: list[Step] = []  # one for each length from there on
        self._chances: dict[int, float] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Updates mu with the last tokens [B]; returns scores [B, V] with -inf at tokens that must not be sampled."""
        if self._continues(input_ids):
            self._observe(input_ids)
        else:
            self._begin(input_ids)
        logp = (scores.float() / self.temperature).log_softmax(-1)
        keep = by_surprise(logp, self.mu) if self.version == 2 else by_zipf(logp, self.mu)
        kept = logp.masked_fill(~keep, -torch.inf)
        self._ids = input_ids
        self._steps.append(Step(self.mu, self._ended, kept if self.surprise == "full" else kept.log_softmax(-1)))
        if len(self._steps) > (needed := PROPOSALS if self.assisted else 1):
            self._steps[-needed - 1] = self._steps[-needed - 1]._replace(logp=None)
        return kept.to(scores.dtype)

    def _continues(self, ids: Tensor) -> bool:
        """Whether these are sequences that Mirostat has seen, and one token each; an error if others drew tokens."""
        if self._ids is None:
            return False
        before, length = self._ids.to(ids.device), ids.shape[1]
        last = before.shape[1]
        shared = min(length - 1, last)
        if ids[:, :shared].shape == before[:, :shared].shape and bool((ids[:, :shared] == before[:, :shared]).all()):
            if self._first < length <= last and not self.assisted:
                raise ValueError(
                    f"Mirostat saw sequences of {last} tokens, then their first {length}: for assisted decoding, make"
                    " it with assisted=True; for a new call, make a new one"
                )
            if length > last + 1:
                raise ValueError(
                    f"{length - last} tokens came at once, but Mirostat has to see each: make a new one for a new call"
                )
            return length > self._first
        if length == last + 1 and bool((ids[:, None, :-1] == before).all(-1).any(-1).all()):
            raise ValueError("the sequences of the last step were reordered, as beams are: Mirostat needs num_beams=1")
        return False

    def _begin(self, ids: Tensor) -> None:
        """The first step of new sequences."""
        for name, value in (("target", self.target), ("rate", self.rate)):
            if isinstance(value, list) and len(value) != len(ids):
                raise ValueError(
                    f"{name} has {len(value)} numbers, but the batch has {len(ids)} rows: give one number, or one for"
                    " each row"
                )
        self.mu = 2 * torch.tensor(self.target, dtype=torch.float32, device=ids.device).expand(len(ids))
        self._ended = torch.zeros_like(self.mu, dtype=torch.bool)
        self._first, self._steps, self.observed, self._chances = ids.shape[1], [], [], dict.fromkeys(DEFAULTS, 0.0)

    def _observe(self, ids: Tensor) -> None:
        """mu after the last token of every sequence, from the state before it: later steps are forgotten."""
        token, steps = ids[:, -1], ids.shape[1] - self._first
        del self._steps[steps:], self.observed[steps - 1 :]
        mu, ended, logp = self._steps[-1]
        if logp is None:
            raise ValueError(
                f"more than {PROPOSALS} tokens were proposed at once: Mirostat follows no more, choose fewer"
            )
        mu, ended, logp = mu.to(ids.device), ended.to(ids.device), logp.to(ids.device)
        surprise = -logp.gather(-1, token[:, None]).squeeze(-1) / math.log(2)
        if not self.assisted:
            out = surprise.isinf()  # padding after the end; were all sequences at their end, generation would stop
            if bool((out | ended).all()):
                raise ValueError(
                    "a token that Mirostat had ruled out was taken: it works with plain sampling, and with assisted"
                    " decoding if it is made with assisted=True"
                )
            ended = ended | out
            self._warn(logp[~ended], token[~ended])
        self.observed.append(torch.where(ended, torch.nan, surprise))
        rate, target = (torch.tensor(value, dtype=mu.dtype, device=mu.device) for value in (self.rate, self.target))
        self.mu = torch.where(ended, mu, mu - rate * (surprise - target))
        self._ended = ended | torch.isin(token, torch.tensor(self.eos, dtype=token.dtype, device=token.device))

    def _warn(self, logp: Tensor, token: Tensor) -> None:
        """A warning once the tokens drawn [n] are too likely, all of them, for the distributions [n, V]."""
        logp = logp.log_softmax(-1)
        for count in [count for count in self._chances if count < logp.shape[-1]]:
            least = logp.topk(count).values[:, -1:]
            if bool((logp.gather(-1, token[:, None]) < least).any()):
                del self._chances[count]  # `generate` keeps more than these
                continue
            self._chances[count] += logp.where(logp >= least, -torch.inf).logsumexp(-1).sum().item()
            if self._chances[count] < UNLIKELY:
                self._chances.clear()
                warnings.warn(
                    f"every token was among the {count} likeliest of those that Mirostat had left: `generate` cuts"
                    " others off after it, and the target may be missed; pass do_sample=True, top_k=0 and top_p=1.0",
                    stacklevel=2,
                )
                return


def positive(name: str, value: Any) -> float | list[float]:
    """A positive number, or a list of them from a list, tensor or array; a ValueError for everything else."""
    found = value.tolist() if hasattr(value, "tolist") else value
    numbers = found if isinstance(found, (list, tuple)) else [found]
    bad = [x for x in numbers if isinstance(x, bool) or not isinstance(x, Real) or not 0 < float(x) < math.inf]
    if bad or not numbers:
        raise ValueError(f"{name} is {value!r}: choose a positive number")
    return [float(x) for x in numbers] if numbers is found else float(found)


def by_surprise(logp: Tensor, mu: Tensor) -> Tensor:
    """Version 2: which tokens [B, V] of log-probabilities [B, V], nats, have at most mu [B] bits of surprise."""
    return (logp >= -mu[:, None] * math.log(2)) | (logp == logp.amax(-1, keepdim=True))


def generate(model: Any, inputs: Tensor | None = None, **options: Any) -> Any:
    """`model.generate` with Mirostat sampling.

    Other options that decide which token is sampled (top_k, top_h, num_beams, watermarks ...) are switched off in the
    model's generation configuration, and refused as arguments; penalties and forbidden tokens act before Mirostat.

    Args:
        model: A causal LM of transformers.
        inputs: Token ids [B, T], as for `model.generate`.
        options: Those of `model.generate`, and `target`, `rate`, `version`, `surprise`, `temperature` of `Mirostat`:
            lists of B targets or rates have one for each prompt, whatever `num_return_sequences` is. With
            `assisted=True`, `assistant_model` (with the same tokenizer), or `prompt_lookup_num_tokens` and
            `max_matching_ngram_size`, are allowed; the tokens then have the distribution of plain Mirostat.

    Returns:
        The result of `model.generate`.

    Raises:
        ValueError: An option samples tokens in another way, has no effect, or is outside its range.
    """
    names = ("target", "rate", "version", "surprise", "temperature", "assisted")
    settings = {name: options.pop(name) for name in names if options.get(name) is not None}
    allowed = ASSISTANTS if settings.get("assisted") is True else ()
    unasked = [name for name in ASSISTANTS if not allowed and options.get(name) is not None]
    if unasked:
        raise ValueError(
            f"{unasked[0]} is given, but Mirostat alone decides which tokens may be sampled: leave it out, or add"
            " assisted=True"
        )
    config, options = settled(model, "Mirostat", options, allowed)
    if allowed and options.get("assistant_model") is None and config.prompt_lookup_num_tokens is None:
        raise ValueError("assisted is True, but nothing assists: add assistant_model or prompt_lookup_num_tokens")
    given = (inputs, options.get("input_ids"), options.get("inputs_embeds"))
    batch = next((len(x) for x in given if x is not None), 1), config.num_return_sequences or 1
    settings |= {name: _repeated(name, settings[name], *batch) for name in ("target", "rate") if name in settings}
    ends = model.generation_config.eos_token_id if config.eos_token_id is None else config.eos_token_id
    options["logits_processor"] = [*(options.get("logits_processor") or ()), Mirostat(**settings, eos=ends)]
    with reduced(model.generation_config, KEPT):
        # of the class: on a model loaded from a repository like `export`'s, the instance's `generate` is this function
        return type(model).generate(model, inputs, generation_config=config, **options)


def _repeated(name: str, value: Any, prompts: int, samples: int) -> float | list[float]:
    """One number for each row of the batch, in which every prompt stands `samples` times; a number as it is."""
    numbers = positive(name, value)
    if isinstance(numbers, list) and len(numbers) != prompts:
        raise ValueError(
            f"{name} has {len(numbers)} numbers, but there are {prompts} prompts: give one number, or one for each"
        )
    return [x for x in numbers for _ in range(samples)] if isinstance(numbers, list) else numbers


def export(folder: str | Path) -> Path:
    """Writes a `custom_generate` repository for the Hub: this file, `decoding.py`, `zipf.py` and a card.

    `model.generate(ids, custom_generate=FOLDER_OR_REPO, trust_remote_code=True, target=3.0)` then samples with it.

    The folder is made if it does not exist, and returned.
    """
    return written(folder, __file__, CARD, beside=("zipf.py",))


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

Options: `target` (bits; or a list of one for each prompt), `rate`, `version` (1 or 2), `surprise` ("full" or
"truncated"), `temperature`; with `assisted=True` also `assistant_model`, which has to have the same tokenizer, or
`prompt_lookup_num_tokens`. Batches keep one state per sequence. It does not work with beams. Code:
`hf_xent.generation.mirostat`.
"""

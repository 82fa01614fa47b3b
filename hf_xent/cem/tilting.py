"""A language model with a bias on a few tokens: its outputs, their weights, and the bias that fits the elites best.

    q_t(x) = p_t(x) exp(b_x) / Z_t        Z_t = sum_x p_t(x) exp(b_x)        b_x = 0 for tokens that have no bias
    w      = prod_t p_t(x_t) / q_t(x_t)   log w = sum_t (log Z_t - b_{x_t})  until the end token, or `tokens` tokens

With a `temperature` T, q_t is made of p_t^(1/T) instead. `hf_xent.cem.elites` finds the bias b.

Source: exponential tilting of every step, fitted as in Rubinstein and Kroese 2004, is this package's own choice of
family; the papers that suggest the cross-entropy method for language models give none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from transformers import LogitsProcessor

from ..generation.decoding import RUNNING, reduced
from ..generation.sampling import check_seed, ends, until_end
from ..models.anatomy import check_room
from ..models.contexts import eval_mode
from ..models.padding import padded
from ..options.ranges import as_number, check_count, check_number, is_integer, is_number
from ..system.progress import tracked
from .elites import maximum, outstanding

Numbers = NDArray[np.float64]
Tilt = dict[int, float]
Rows = list[tuple[int, list[int]]]  # the number of the prompt, and the new tokens
ELEMENTS = 2**25  # logits in memory when elites are read


@dataclass
class Tilting:
    """The options of `hf_xent.cem.rare.estimate`."""

    tokens: int = 32
    """The maximum number of new tokens."""
    draws: int = 2000
    """Draws of the estimate."""
    per_level: int = 500
    """Draws of each level."""
    rho: float = 0.1
    """The share of elites in a level."""
    levels: int = 8
    """The most levels; with 0 the estimate is drawn under `bias` as it is, which without one is plain sampling."""
    bias: Mapping[int, float] | None = None
    """Token -> bias to begin with; then only these tokens get one. None chooses the tokens."""
    chosen: int = 8
    """How many tokens are chosen at most if `bias` is None."""
    temperature: float = 1.0
    """Temperature of the distribution that is drawn from; the probability is that at 1, always."""
    batch_size: int = 64
    """Outputs that are sampled at a time; the draws depend on it."""
    seed: int = 0
    """Seed of all draws, a whole number of 64 bits."""
    tokenizer: Any = None
    """If it is given, prompts are texts or token ids, and the event is given the text of the new tokens."""

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("draws", 2), ("per_level", 2), ("levels", 0), ("batch_size", 1)):
            check_count(name, getattr(self, name), least)
        check_count("chosen", self.chosen, 1)
        check_number(self, "temperature", "(0, inf)")
        check_seed(self.seed)
        for token, value in (self.bias or {}).items():
            if not is_integer(token) or not is_number(value, "(-inf, inf)"):
                raise ValueError(f"bias is {self.bias!r}: give token ids with finite numbers")


def settled(options: Mapping[str, Any]) -> Tilting:
    """The options as an object. Raises: ValueError if one is unknown or out of range."""
    known = [field.name for field in fields(Tilting)]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"estimate does not take {', '.join(unknown)}: its options are {', '.join(known)}")
    return Tilting(**options)


@contextmanager
def sampler(model: Any, prompts: Any, event: Any, settings: Tilting) -> Iterator[Sampler]:
    """A context with a `Sampler`, in which the model is in evaluation mode and torch's generators are its own."""
    drawn = Sampler(model, _rows(prompts, settings.tokenizer), event, settings)
    with torch.random.fork_rng(), eval_mode(model), torch.no_grad():
        torch.manual_seed(settings.seed)
        yield drawn


def _rows(prompts: Any, tokenizer: Any) -> list[list[int]]:
    """The token ids of each prompt. Raises: ValueError if there are none, or they are texts without a tokenizer."""
    prompts = prompts.tolist() if isinstance(prompts, Tensor | np.ndarray) else prompts
    several = [prompts] if isinstance(prompts, str) else list(prompts)
    if several and is_integer(several[0]):
        several = [several]
    if tokenizer is not None:
        several = [tokenizer(row)["input_ids"] if isinstance(row, str) else row for row in several]
    if not several or not all(isinstance(row, Sequence) and len(row) for row in several):
        raise ValueError(f"prompts has {len(several)} rows: pass at least one, and at least one token in each")
    if any(isinstance(row, str) for row in several):
        raise ValueError("prompts is text: pass a tokenizer, too, or token ids")
    return [[int(token) for token in row] for row in several]


class Bias(LogitsProcessor):
    """Makes the scores log q, and adds up the log-weights of the sequences, `log_weights` [B] float64.

    One object serves one call of `generate`; `observe` is called with its last tokens when it ends.

    Args:
        tilt: Token -> bias.
        temperature: Of q.
        stop: The end tokens, after which nothing counts.
    """

    def __init__(self, tilt: Tilt, temperature: float, stop: Sequence[int]):
        self.tokens, self.bias, self.temperature = list(tilt), list(tilt.values()), temperature
        self.stop = list(stop)
        self.log_weights = torch.empty(0)
        self._ratio: Tensor | None = None  # log p - log q [B, V] of the token that is drawn now
        self._open = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Counts the last tokens; returns log q [B, V] for scores [B, V]."""
        if self._ratio is None:
            self.log_weights = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
            self._open = torch.ones_like(self.log_weights, dtype=torch.bool)
        else:
            self.observe(input_ids[:, -1])
        logp = scores.float().log_softmax(-1)
        logq = tilted(logp, self.tokens, self.bias, self.temperature)
        self._ratio = logp - logq
        return logq

    def observe(self, token: Tensor) -> None:
        """Counts the tokens [B] that were drawn."""
        assert self._ratio is not None
        ratio = self._ratio.gather(1, token[:, None]).squeeze(1).double()
        self.log_weights += torch.where(self._open, ratio, 0.0)
        self._open &= ~torch.isin(token, torch.tensor(self.stop, dtype=token.dtype, device=token.device))


def tilted(logp: Tensor, tokens: Sequence[int], bias: Sequence[float], temperature: float) -> Tensor:
    """log q [..., V] for log p [..., V]; the very same tensor if nothing tilts it."""
    if temperature == 1 and not any(bias):
        return logp
    scores = logp / temperature
    if tokens:
        index = torch.tensor(tokens, device=logp.device)
        scores = scores.index_add(-1, index, scores.new_tensor(bias).expand(*scores.shape[:-1], -1))
    return scores.log_softmax(-1)


class Sampler:
    """Draws of a model's outputs under a tilt: `drawn(tilt, n)` is the outputs, their scores and log-weights."""

    def __init__(self, model: Any, prompts: list[list[int]], event: Any, settings: Tilting):
        self.model, self.prompts, self.event, self.settings = model, prompts, event, settings
        length = max(map(len, prompts))
        check_room(model, length + settings.tokens, f"length of prompts ({length}) and tokens ({settings.tokens})")
        size = model.config.get_text_config().vocab_size
        if outside := [token for token in settings.bias or {} if not 0 <= token < size]:
            raise ValueError(f"bias has the token {outside[0]}, but the model has {size} tokens: leave it out")

    def __call__(self, tilt: Tilt, n: int, name: str) -> tuple[Rows, Numbers, Numbers]:
        """n outputs, the prompts taking turns, their scores [n] and log-weights [n]."""
        rows: Rows = []
        log_weights: list[Tensor] = []
        starts = range(0, n, self.settings.batch_size)
        quiet = not sys.stderr.isatty()
        with tracked(starts, name, console=Console(stderr=True), transient=True, disable=quiet) as bar:
            for start in bar:
                which = [i % len(self.prompts) for i in range(start, min(n, start + self.settings.batch_size))]
                new, weights = self._batch(tilt, [self.prompts[i] for i in which])
                rows += zip(which, new, strict=True)
                log_weights.append(weights.cpu())
        return rows, self._scores(rows), torch.cat(log_weights).numpy()

    def _batch(self, tilt: Tilt, prompts: list[list[int]]) -> tuple[list[list[int]], Tensor]:
        """The new tokens of each prompt, with the end token, and their log-weights."""
        config, stop = self.model.generation_config, [token for token in ends(self.model) if token is not None]
        pad = config.pad_token_id or 0
        ids, mask = padded(prompts, pad, left=True, device=self.model.device)
        bias = Bias(tilt, self.settings.temperature, stop)
        with reduced(config, RUNNING):
            sequences = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=self.settings.tokens, pad_token_id=pad, do_sample=True,
                top_k=0, top_p=1.0, temperature=1.0, logits_processor=[bias], return_dict_in_generate=False,
            )  # fmt: skip
        bias.observe(sequences[:, -1])
        return until_end(sequences[:, ids.shape[1] :].tolist(), stop), bias.log_weights

    def _scores(self, rows: Rows) -> Numbers:
        outputs: list[Any] = [new for _, new in rows]
        if self.settings.tokenizer is not None:
            outputs = self.settings.tokenizer.batch_decode(outputs, skip_special_tokens=True)
        scores = np.array([as_number("the event's score", self.event(output)) for output in outputs])
        if np.isnan(scores).any():
            raise ValueError("event gives NaN for an output: give every output a number, or True or False")
        return scores

    def fitted(self, tilt: Tilt, rows: Rows, elite: NDArray[np.bool_], log_weights: Numbers) -> Tilt:
        """The tilt that fits the elites among the outputs best, for outputs that were drawn under another tilt."""
        kept = log_weights[elite]
        weights = np.exp(kept - kept.max())
        weights /= weights.sum()
        elites = [row for row, is_elite in zip(rows, elite, strict=True) if is_elite]
        effective = 1 / float((weights**2).sum())
        tokens = list(tilt)
        if self.settings.bias is None:
            tokens += outstanding([new for _, new in rows], elite, weights * effective, tokens, self.settings.chosen)
        if not tokens:
            return tilt
        counted, base = self._read(elites, tokens)
        repeated = np.repeat(weights * effective, [len(new) for _, new in elites])
        start = np.array([tilt.get(token, 0.0) for token in tokens])
        return dict(zip(tokens, maximum(base, counted, repeated, start).tolist(), strict=True))

    def _read(self, elites: Rows, tokens: list[int]) -> tuple[Numbers, Numbers]:
        """Of all N steps of the elites: which of K tokens each is, 0 or 1 [N, K], and their untilted probabilities."""
        found = []
        longest = max(len(self.prompts[which]) + len(new) for which, new in elites)
        size = self.model.config.get_text_config().vocab_size
        batch = max(1, ELEMENTS // (longest * size))
        for start in range(0, len(elites), batch):
            part = elites[start : start + batch]
            ids, mask = padded([self.prompts[which] + new for which, new in part], 0, device=self.model.device)
            logits = self.model(input_ids=ids, attention_mask=mask).logits
            for row, (which, new) in zip(logits, part, strict=True):
                first = len(self.prompts[which]) - 1
                steps = (row[first : first + len(new)].float() / self.settings.temperature).softmax(-1)
                found.append(steps[:, tokens].double().cpu().numpy())
        used = np.array([token for _, new in elites for token in new])
        return (used[:, None] == np.array(tokens)).astype(float), np.concatenate(found)

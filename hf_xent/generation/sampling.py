"""What samples of a language model look like: diversity and repetition of n-grams, nearness to text, given an entropy.

    distinct-n = distinct n-grams of all sequences / n-grams of all      Li et al. 2016, arXiv:1510.03055
    rep-n      = mean over sequences of 1 - distinct n-grams / n-grams   Welleck et al. 2019, arXiv:1908.04319
    MAUVE      = area under (exp(-c KL(Q || R)), exp(-c KL(P || R)))     Pillutla et al. 2021, arXiv:2102.01454

A sharper model repeats more and errs less: compare models at equal entropy (`temperature_at`), or say that they differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor

from ..models.contexts import positions
from ..ops import Head, vocab_stats
from ..options.ranges import check_count, is_integer, is_number
from ..patching import patched
from .mirostat import RUNNING, reduced

Tokens = Sequence[Sequence[int]]


def distinct(sequences: Tokens, n: int) -> float:
    """distinct-n in [0, 1]; nan if no sequence has n tokens. Raises: ValueError for n < 1, as `repetition`."""
    grams = [gram for sequence in sequences for gram in _grams(sequence, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(sequences: Tokens, n: int = 4) -> float:
    """rep-n in [0, 1], over sequences of at least n tokens; nan if there are none."""
    shares = [1 - len(set(grams)) / len(grams) for s in sequences if (grams := list(_grams(s, n)))]
    return sum(shares) / len(shares) if shares else float("nan")


@torch.no_grad()
def responses(
    model: Any, prompts: Tokens, *, tokens: int = 32, seed: int = 0, temperature: float = 1.0
) -> list[list[int]]:
    """Continuations of prompts of any lengths, by unbiased sampling; greedy at temperature 0.

    Nothing is cut off, penalized or assisted, whatever the model's generation configuration says. Each ends with its
    end token, or after `tokens` without one. torch's generators are left as they were. Raises: ValueError for a
    negative temperature, tokens or a seed that are no whole numbers, no prompts or an empty one, or more tokens than
    the model has positions for.
    """
    if not is_number(temperature, "[0, inf)"):
        raise ValueError(f"temperature is {temperature!r}: choose a positive number, or 0 for greedy decoding")
    check_count("tokens", tokens, 1)
    if not is_integer(seed) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}: choose a whole number of 64 bits")
    if not len(prompts) or not all(map(len, prompts)):
        raise ValueError(f"prompts has {len(prompts)} rows, all of which need a token at least")
    if (room := positions(model)) is not None and max(map(len, prompts)) + tokens > room:
        raise ValueError(f"prompts of {max(map(len, prompts))} tokens and {tokens} more exceed {room} positions")
    length, pad = max(map(len, prompts)), model.generation_config.pad_token_id or 0
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    how: dict[str, Any] = {"do_sample": False}
    if temperature:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng(), reduced(model.generation_config, RUNNING):
        torch.manual_seed(seed)
        made = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=pad, **how)
    made = made[:, length:].tolist()
    stop = ends(model)
    return [row[: next((i + 1 for i, token in enumerate(row) if token in stop), len(row))] for row in made]


def sample(
    model: Any, prompts: Tensor | Tokens, *, tokens: int = 32, seed: int = 0, temperature: float = 1.0
) -> list[list[int]]:
    """`responses` without their end tokens; prompts [B, T], or of several lengths."""
    stop = ends(model)
    rows = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    made = responses(model, rows, tokens=tokens, seed=seed, temperature=temperature)
    return [row[:-1] if row and row[-1] in stop else row for row in made]


@torch.no_grad()
def features(model: Any, sequences: Tokens) -> Tensor:
    """The model's last hidden state at the last token of every sequence [N, D], float32: what `mauve` compares."""
    body = model.get_decoder()
    found = [body(torch.tensor([list(row)], device=model.device)).last_hidden_state[0, -1] for row in sequences]
    return torch.stack(found).float().cpu()


def mauve(human: Tensor, machine: Tensor, *, clusters: int | None = None, scale: float = 5.0, seed: int = 0) -> float:
    """MAUVE in (0, 1] of the features [N, D] of two sets of texts; 1 where they are spread alike.

    P and Q are the shares of both sets in k-means clusters (by default a tenth of the smaller set's texts) of the
    features' unit rows in as many principal components as hold 90 % of the variance; R runs through the mixtures of P
    and Q. It depends on the encoder and on N: published numbers are of GPT-2-large and thousands of texts, so
    name the model that `features` were of, compare within one setting, and expect nothing of a few dozen texts.

    Raises: ValueError for fewer than two clusters, more than there are texts, or a scale that is not positive.
    """
    if not is_number(scale, "(0, inf)"):
        raise ValueError(f"scale is {scale!r}: choose a positive number")
    total = len(human) + len(machine)
    if clusters is not None and not (is_integer(clusters) and 2 <= clusters <= total):
        raise ValueError(f"clusters is {clusters!r}: choose a whole number from 2 to {total}, the number of texts")
    count = clusters or max(2, round(min(len(human), len(machine)) / 10))
    rows = torch.nn.functional.normalize(torch.cat([human, machine]).double(), dim=-1).numpy()
    rows = PCA(n_components=0.9, svd_solver="full").fit_transform(rows)
    places = torch.from_numpy(KMeans(count, n_init=5, random_state=seed).fit_predict(rows)).long()
    p, q = (x.bincount(minlength=count) / len(x) for x in (places[: len(human)], places[len(human) :]))
    share = torch.linspace(1e-6, 1 - 1e-6, 25, dtype=torch.float64)[:, None]
    mixed = share * p + (1 - share) * q
    x, y = ((-scale * (torch.xlogy(d, d) - torch.xlogy(d, mixed)).sum(-1)).exp() for d in (q, p))
    return float(torch.trapezoid(y, -x) + x[-1])  # x falls; the curve goes on level to the axis


@torch.no_grad()
def temperature_of(hidden: Tensor, head: Head, labels: Tensor, entropy: float, *, steps: int = 24) -> float:
    """The temperature at which the mean entropy (nats) over tokens with a label is `entropy`, bisected in [0.05, 4].

    hidden [..., D], labels [...]; each step is one pass over the head. Raises: ValueError if no temperature has it.
    """

    def mean(temperature: float) -> float:
        stats = vocab_stats(hidden, head.tempered(temperature), labels, outputs=("entropy",))
        return float(stats.entropy.sum() / stats.mask.sum())

    low, high = 0.05, 4.0
    if not mean(low) <= entropy <= mean(high):
        raise ValueError(
            f"entropy is {entropy}: between temperatures {low} and {high} it is {mean(low)} to {mean(high)}"
        )
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < entropy else (low, middle)
    return (low + high) / 2


@torch.no_grad()
def temperature_at(model: Any, ids: Tensor, entropy: float) -> float:
    """`temperature_of` a causal LM that predicts every token of ids [B, T] but the first; the model stays as it was."""
    with patched(model, always=True):
        logits = model(input_ids=ids).logits[:, :-1]
    return temperature_of(logits.hidden, logits.head, ids[:, 1:], entropy)


def ends(model: Any) -> set[int | None]:
    """The tokens that end a sequence."""
    found = model.generation_config.eos_token_id
    return set(found if isinstance(found, list) else [found])


def _grams(sequence: Sequence[int], n: int) -> Iterator[tuple[int, ...]]:
    if not is_integer(n) or n < 1:
        raise ValueError(f"n is {n!r}: n-grams have at least one token")
    return (tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1))

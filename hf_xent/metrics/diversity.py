"""How diverse sampled texts are, how much they repeat themselves, and how near they are to human ones.

    distinct-n = distinct n-grams of all sequences / n-grams of all      Li et al. 2016, arXiv:1510.03055
    rep-n      = mean over sequences of 1 - distinct n-grams / n-grams   Welleck et al. 2019, arXiv:1908.04319
    MAUVE      = area under (exp(-c KL(Q || R)), exp(-c KL(P || R)))     Pillutla et al. 2021, arXiv:2102.01454

A sharper model repeats more and errs less: compare models at equal entropy (`hf_xent.generation.sampling`), or say that
they differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor

from ..options.ranges import is_integer, is_number

Tokens = Sequence[Sequence[int]]


def distinct(sequences: Tokens, n: int) -> float:
    """The share of n-grams that are different ones.

    Args:
        sequences: Token ids of each text.
        n: Tokens of an n-gram.

    Returns:
        distinct-n in [0, 1], over the n-grams of all sequences together; nan if none has n tokens.

    Raises:
        ValueError: n is no whole number, or below 1.
    """
    grams = [gram for sequence in sequences for gram in _grams(sequence, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(sequences: Tokens, n: int = 4) -> float:
    """The share of n-grams that a text has had before.

    Args:
        sequences: Token ids of each text.
        n: Tokens of an n-gram.

    Returns:
        rep-n in [0, 1], a mean over the sequences of at least n tokens; nan if there are none.

    Raises:
        ValueError: n is no whole number, or below 1.
    """
    shares = [1 - len(set(grams)) / len(grams) for s in sequences if (grams := list(_grams(s, n)))]
    return sum(shares) / len(shares) if shares else float("nan")


@torch.no_grad()
def features(model: Any, sequences: Tokens) -> Tensor:
    """What `mauve` compares: a model's last hidden state at the last token of every text.

    Args:
        model: A causal LM of transformers.
        sequences: Token ids of each text, one at least.

    Returns:
        Features [N, D], float32, on the CPU.
    """
    decoder = model.get_decoder()
    states = [decoder(torch.tensor([list(row)], device=model.device)).last_hidden_state[0, -1] for row in sequences]
    return torch.stack(states).float().cpu()


def mauve(human: Tensor, machine: Tensor, *, clusters: int | None = None, scale: float = 5.0, seed: int = 0) -> float:
    """How alike two sets of texts are spread.

    P and Q are the shares of both sets in k-means clusters (by default a tenth of the smaller set's texts) of the
    features' unit rows in as many principal components as hold 90 % of the variance; R runs through the mixtures of P
    and Q. It depends on the encoder and on N: published numbers are of GPT-2-large and thousands of texts, so
    name the model that `features` were of, compare within one setting, and expect nothing of a few dozen texts.

    Args:
        human: Features [N, D] of the one set.
        machine: Features [M, D] of the other.
        clusters: Of k-means, from 2 to N + M; None is a tenth of the smaller set's texts.
        scale: c of the formula, above 0.
        seed: Of k-means.

    Returns:
        MAUVE in (0, 1]; 1 where both sets are spread alike.

    Raises:
        ValueError: Fewer than two clusters, more than there are texts, or a scale that is not positive.
    """
    if not is_number(scale, "(0, inf)"):
        raise ValueError(f"scale is {scale!r}: choose a positive number")
    total = len(human) + len(machine)
    if clusters is not None and not (is_integer(clusters) and 2 <= clusters <= total):
        raise ValueError(f"clusters is {clusters!r}: choose a whole number from 2 to {total}, the number of texts")
    count = clusters or max(2, round(min(len(human), len(machine)) / 10))
    rows = torch.nn.functional.normalize(torch.cat([human, machine]).double(), dim=-1).numpy()
    rows = PCA(n_components=0.9, svd_solver="full").fit_transform(rows)
    assigned = torch.from_numpy(KMeans(count, n_init=5, random_state=seed).fit_predict(rows)).long()
    p, q = (x.bincount(minlength=count) / len(x) for x in (assigned[: len(human)], assigned[len(human) :]))
    share = torch.linspace(1e-6, 1 - 1e-6, 25, dtype=torch.float64)[:, None]
    mixed = share * p + (1 - share) * q
    x, y = ((-scale * (torch.xlogy(d, d) - torch.xlogy(d, mixed)).sum(-1)).exp() for d in (q, p))
    return float(torch.trapezoid(y, -x) + x[-1])  # x falls; the curve goes on level to the axis


def _grams(sequence: Sequence[int], n: int) -> Iterator[tuple[int, ...]]:
    if not is_integer(n) or n < 1:
        raise ValueError(f"n is {n!r}: n-grams have at least one token")
    return (tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1))

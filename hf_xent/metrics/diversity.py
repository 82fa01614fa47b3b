"""How diverse sampled texts are, how much they repeat themselves, and how close they are to human texts.

    distinct-n = distinct n-grams / n-grams, of all sequences together   Li et al. 2016, arXiv:1510.03055
    rep-n      = mean over sequences of 1 - distinct n-grams / n-grams   Welleck et al. 2019, arXiv:1908.04319
    MAUVE      = area under (exp(-c KL(Q || R)), exp(-c KL(P || R)))     Pillutla et al. 2021, arXiv:2102.01454

A model with lower entropy repeats itself more and errs less: compare models at equal entropy
(`hf_xent.generation.sampling`), or state their entropies.
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
    """The number of distinct n-grams as a share of all n-grams.

    Args:
        sequences: Token ids of each text.
        n: Number of tokens in an n-gram.

    Returns:
        distinct-n in [0, 1], over the n-grams of all sequences together; nan if none has n tokens.

    Raises:
        ValueError: n is not a whole number, or is below 1.
    """
    grams = [gram for sequence in sequences for gram in _grams(sequence, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(sequences: Tokens, n: int = 4) -> float:
    """The share of n-grams that repeat an earlier one of the same text.

    Args:
        sequences: Token ids of each text.
        n: Number of tokens in an n-gram.

    Returns:
        rep-n in [0, 1], a mean over the sequences of at least n tokens; nan if there are none.

    Raises:
        ValueError: n is not a whole number, or is below 1.
    """
    shares = [1 - len(set(grams)) / len(grams) for s in sequences if (grams := list(_grams(s, n)))]
    return sum(shares) / len(shares) if shares else float("nan")


@torch.no_grad()
def features(model: Any, sequences: Tokens) -> Tensor:
    """The features that `mauve` compares: a model's last hidden state at the last token of every text.

    Args:
        model: A causal LM of transformers.
        sequences: Token ids of each text, at least one.

    Returns:
        Features [N, D], float32, on the CPU.
    """
    decoder = model.get_decoder()
    states = [decoder(torch.tensor([list(row)], device=model.device)).last_hidden_state[0, -1] for row in sequences]
    return torch.stack(states).float().cpu()


def mauve(human: Tensor, machine: Tensor, *, clusters: int | None = None, scale: float = 5.0, seed: int = 0) -> float:
    """MAUVE: how similar the distributions of two sets of texts are.

    P and Q are the shares of both sets in k-means clusters of the features, which are normalized to unit length and
    reduced to as many principal components as hold 90 % of the variance; R runs through the mixtures of P and Q. MAUVE
    depends on the encoder and on N: published numbers are of GPT-2-large and thousands of texts. So name the model of
    the `features`, compare within one setting, and do not rely on a few dozen texts.

    Args:
        human: Features [N, D] of one set.
        machine: Features [M, D] of the other set.
        clusters: Number of clusters, from 2 to N + M; None is a tenth of the number of texts in the smaller set.
        scale: c of the formula, above 0.
        seed: Seed of k-means.

    Returns:
        MAUVE in (0, 1]; 1 for equal distributions.

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
    return float(torch.trapezoid(y, -x) + x[-1])  # x decreases; the curve is extended horizontally to the axis


def _grams(sequence: Sequence[int], n: int) -> Iterator[tuple[int, ...]]:
    if not is_integer(n) or n < 1:
        raise ValueError(f"n is {n!r}: n-grams have at least one token, choose a whole number from 1")
    return (tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1))

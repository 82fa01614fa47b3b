"""The bias of a few tokens that fits the elites among a language model's outputs best, and which tokens these are.

A bias b adds to the logits (`hf_xent.cem.tilting`). The best one of K tokens maximises the elites' weighted
log-likelihood, with W = w / sum w of each elite and m = (sum w)^2 / sum w^2, their effective number:

    F(b) = m sum_i W_i sum_t (b_{x_it} - log Z_it(b)) - |b - b'|^2 / 2         b' is the bias they were drawn under
    dF/db_k = m sum_i W_i (n_ik - sum_t q_it(k)) - (b_k - b'_k)                n_ik counts token k in output i

So at the maximum the tilted model uses each token as often as the elites do, which is moment matching. F is strictly
concave (log Z_t is convex) and Newton's steps on its K x K Hessian find the maximum; the probabilities of the K tokens
along each elite, one forward pass without sampling, are all it takes. The last term keeps b finite for a token that no
elite, or every elite, uses, and holds it back when few elites carry the weight.

Tokens are given, or chosen from the elites, those whose counts differ most from the counts of all draws of the level:

    z_k = (sum_i W_i n_ik - mean n_k) / sqrt(v_k / m)        v_k = mean n_k, at least 1 / draws; |z_k| >= 3 is required

A token of positive z has to be in two elites, or else every rare token of a single elite would stand out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
LEAST = 3.0  # the least |z| of a token that is chosen


def outstanding(
    outputs: Sequence[Sequence[int]], elite: NDArray[np.bool_], weights: Numbers, known: Sequence[int], most: int
) -> list[int]:
    """The tokens whose counts in the elites stand out most from those in all outputs.

    Args:
        outputs: The tokens of each output.
        elite: Which outputs are elites [n].
        weights: m W of each elite.
        known: Tokens that are chosen already, and not chosen again.
        most: How many there are at most, with the known ones.
    """
    elites = [new for new, is_elite in zip(outputs, elite, strict=True) if is_elite]
    tokens, every = np.concatenate(elites), np.concatenate(outputs)
    size = int(every.max()) + 1
    of_all = np.bincount(every, minlength=size) / len(outputs)
    of_elites = np.bincount(tokens, np.repeat(weights, list(map(len, elites))), minlength=size) / weights.sum()
    z = (of_elites - of_all) / np.sqrt(np.maximum(of_all, 1 / len(outputs)) / weights.sum())
    z[[token for token in known if token < size]] = 0
    within = np.bincount([token for new in elites for token in {*new}], minlength=size)
    z[(z > 0) & (within < min(2, len(elites)))] = 0
    best = np.argsort(-np.abs(z), kind="stable")[: max(most - len(known), 0)]
    return [int(token) for token in best if abs(z[token]) >= LEAST]


def maximum(base: Numbers, counted: Numbers, weights: Numbers, start: Numbers, steps: int = 50) -> Numbers:
    """The bias b [K] at which F of the module's docstring is largest, by Newton's method with halved steps.

    Args:
        base: Probabilities of the K tokens at each step [N, K], without bias.
        counted: Which of them the step's token is [N, K], 0 or 1.
        weights: The weight of each step, m W of its output [N].
        start: The bias b' [K] that the last term pulls to.
        steps: The most steps; they end when none changes b by more than 1e-9.
    """

    def parts(b: Numbers) -> tuple[float, Numbers]:
        odds = base * np.exp(b)
        z = odds.sum(1) + np.maximum(1 - base.sum(1), 0)
        return float(weights @ (counted @ b - np.log(z)) - ((b - start) ** 2).sum() / 2), odds / z[:, None]

    b = start.copy()
    value, q = parts(b)
    for _ in range(steps):
        gradient = weights @ (counted - q) - (b - start)
        hessian = np.diag(weights @ q) - (q * weights[:, None]).T @ q + np.eye(len(b))
        step = np.linalg.solve(hessian, gradient)
        for halving in range(30):
            after, q_after = parts(b + step / 2**halving)
            if after >= value:
                break
        else:
            return b
        b, value, q = b + step / 2**halving, after, q_after
        if np.abs(step).max() / 2**halving < 1e-9:
            break
    return b

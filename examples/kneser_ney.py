"""An n-gram language model as a baseline: interpolated Kneser-Ney smoothing.

    p_n(w|c) = max(count(cw) - d_n, 0) / count(c) + d_n distinct(c) / count(c) p_n-1(w|c')         p_0 = 1 / V

with counts of distinct left neighbors below the highest order, and d_n = n_1 / (n_1 + 2 n_2) of each order's counts.
Source: Kneser, Ney 1995, Improved backing-off for m-gram language modeling; interpolated as in Chen, Goodman 1999.
"""

from __future__ import annotations

import math
from collections import Counter


def kneser_ney(train: list[list[int]], test: list[list[int]], vocabulary: int, order: int = 4) -> float:
    """Held-out nats per token of interpolated Kneser-Ney; the first token of a test row is context only."""
    grams = [Counter(tuple(row[i : i + order]) for row in train for i in range(len(row) - order + 1))]
    for _ in range(order - 1):  # of distinct left neighbors
        grams.insert(0, Counter(gram[1:] for gram in grams[0]))
    totals: list[Counter[tuple[int, ...]]] = [Counter() for _ in grams]
    kinds = [Counter(gram[:-1] for gram in level) for level in grams]
    discounts = []
    for level, total in zip(grams, totals, strict=True):
        for gram, count in level.items():
            total[gram[:-1]] += count
        often = Counter(level.values())
        discounts.append(often[1] / max(1, often[1] + 2 * often[2]))

    def probability(gram: tuple[int, ...]) -> float:
        p = 1 / vocabulary
        for n in range(1, len(gram) + 1):
            tail, level = gram[-n:], n - 1
            total = totals[level][tail[:-1]]
            if total:
                d = discounts[level]
                p = max(grams[level][tail] - d, 0) / total + d * kinds[level][tail[:-1]] / total * p
        return p

    surprises = [
        -math.log(probability(tuple(row[max(0, i - order + 1) : i + 1]))) for row in test for i in range(1, len(row))
    ]
    return sum(surprises) / len(surprises)

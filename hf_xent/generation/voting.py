"""Self-consistency: one answer out of several sampled ones, by the votes of the samples, weighted or not.

Source: Wang et al. 2023, Self-consistency improves chain of thought reasoning in language models, arXiv:2203.11171.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence


def majority(answers: Sequence[Hashable | None], weights: Iterable[float] | None = None) -> Hashable | None:
    """The answer of the largest total weight.

    Args:
        answers: The answer of each sample; None where it has none.
        weights: The weight of each sample, such as those of `paths.generate`; without it every sample counts alike.

    Returns:
        The answer, the earlier one of equals; None if no sample of positive weight has an answer.

    Raises:
        ValueError: There are not as many weights as answers, or one of them is negative or NaN.
    """
    shares = [1.0] * len(answers) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(answers) or not all(share >= 0 for share in shares):
        raise ValueError(f"weights is {shares} for {len(answers)} answers: pass as many, none of them negative")
    totals: dict[Hashable, float] = {}
    for answer, share in zip(answers, shares, strict=True):
        if answer is not None and share > 0:
            totals[answer] = totals.get(answer, 0.0) + share
    return max(totals, key=totals.__getitem__) if totals else None

"""Two tokenizations of one text, aligned where both end a token at the same byte.

    student    | Un | believ | able |  news |          Unbelievable news
    teacher    | Unbe | liev  | able |  news |
    groups     [Un, believ] = [Unbe, liev]     [able] = [able]     [ news] = [ news]

Before the first token of a group both models have read the same text, so that their predictions are about the same
thing; within a group they have not.

Source: the groups are those of GOLD, Patiño et al. 2025, Unlocking On-Policy Distillation for Any Model Family
(huggingface.co/spaces/HuggingFaceH4/general-on-policy-logit-distillation), as in TRL's `ULDLoss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

Group = tuple[list[int], list[int]]
"""Indices of the student's tokens and of the teacher's that cover the same bytes."""


def groups(student: Sequence[int], teacher: Sequence[int]) -> list[Group]:
    """The shortest groups of tokens that cover the same bytes, in order.

    Args:
        student: How many bytes each of the student's tokens covers; tokens of 0 bytes belong to no group.
        teacher: The same of the teacher's tokens.

    Returns:
        The groups up to the last byte where both end a token.
    """
    (ours, our_ends), (theirs, their_ends) = _ends(student), _ends(teacher)
    found, i, j = [], 0, 0
    common = {end: k for k, end in enumerate(their_ends)}
    for k, end in enumerate(our_ends):
        if end in common:
            found.append((ours[i : k + 1], theirs[j : common[end] + 1]))
            i, j = k + 1, common[end] + 1
    return found


def _ends(lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """The tokens that cover bytes, and where each of them ends."""
    kept = [(k, end) for k, (length, end) in enumerate(zip(lengths, accumulate(lengths), strict=True)) if length]
    return [k for k, _ in kept], [end for _, end in kept]

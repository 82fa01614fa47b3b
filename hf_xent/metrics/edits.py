"""How many edits lie between two sequences, and error rates of characters or words.

    distance(a, b) = the fewest insertions, deletions and substitutions that make b of a
    rate = sum over pairs of distance(reference, hypothesis) / sum of the references' lengths

The rate of characters is that of strings, the rate of words that of lists of words. It may exceed 1; that of empty
hypotheses is 1.

Source: Levenshtein 1966; a column of the table at a time, as bits of one number, Hyyro 2003, A Bit-Vector Algorithm for
Computing Levenshtein and Damerau Edit Distances.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def edit_distance(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """The Levenshtein distance of two strings, or of two lists of words or ids; insertions and all else cost 1."""
    if not one:
        return len(other)
    places: dict[Hashable, int] = {}
    for i, item in enumerate(one):
        places[item] = places.get(item, 0) | 1 << i
    full, last = (1 << len(one)) - 1, 1 << len(one) - 1
    up, down, distance = full, 0, len(one)  # rows where the column goes up, or down, by one
    for item in other:
        equal = places.get(item, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        right_up, right_down = (down | ~(diagonal | up)) & full, up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up, right_down = right_up << 1 | 1, right_down << 1
        steps = equal | down
        up, down = (right_down | ~(steps | right_up)) & full, right_up & steps & full
    return distance


def error_rate(references: Sequence[Sequence[Hashable]], hypotheses: Sequence[Sequence[Hashable]]) -> float:
    """The edits of all pairs, divided by the length of all references.

    Args:
        references: What is right: strings for the rate of characters, lists of words for that of words.
        hypotheses: What was found, one for each reference.

    Returns:
        The rate, >= 0.

    Raises:
        ValueError: Their numbers differ, or all references are empty.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"references are {len(references)} and hypotheses {len(hypotheses)}: give one for each")
    length = sum(map(len, references))
    if not length:
        raise ValueError("references are empty: give at least one with a character or a word")
    return sum(map(edit_distance, references, hypotheses)) / length

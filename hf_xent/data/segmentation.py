"""Ways to cut a text into pieces as paths: the shortest one, the shortest of at most k edges, and the sum over all.

    cost(z) = sum_i -log p(z_i)        best of at most k: min over z of length <= k        all: log sum_z exp(-cost(z))

The positions of a text are nodes, and a piece is an edge from where it starts to where it ends. Edges point forward, so
one pass in the order of positions finds the shortest path (Viterbi). Bellman and Ford's algorithm relaxes all edges in
rounds; after round k it has the shortest paths of k edges, which bounds their number.

Source: arXiv:2410.18441, whose sub-word encoding is a shortest path of k steps, and which reports no measurements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from ..options.ranges import check_count

Edges = list[list[tuple[int, float]]]
"""For every position of a text, the pieces that start there: where each ends, and its cost."""


class Path(NamedTuple):
    """A way to cut a text."""

    pieces: tuple[str, ...]
    cost: float
    """The sum of -log p of the pieces, in nats."""


def shortest_path(pieces: Mapping[str, float], text: str, most: int | None = None) -> Path:
    """The cheapest way to cut a text into pieces, at most `most` of them: argmin_z sum_i -log p(z_i).

    Args:
        pieces: Piece -> its log-probability in nats, at most 0; -inf for a piece that is not used.
        text: What to cut.
        most: The largest number of pieces; None for any.

    Returns:
        The path. Without a bound it is that of `tokenizers`; among equal ones, the last piece is the longest possible,
        then the one before it and so on. A bound that this path keeps changes nothing; under one that it breaks, equal
        paths are told apart by the number of pieces first.

    Raises:
        ValueError: A log-probability above 0, an empty piece, a text that the pieces cannot make up, or a bound below
            the smallest number of pieces.
    """
    return Segmenter(pieces).shortest([text], most)


class Segmenter:
    """Pieces that any number of texts are cut into.

    Args:
        pieces: Piece -> its log-probability in nats, as of `shortest_path`.

    Raises:
        ValueError: A log-probability above 0, or an empty piece.
    """

    def __init__(self, pieces: Mapping[str, float]):
        for piece, score in pieces.items():
            if not (piece and score <= 0):
                raise ValueError(f"pieces has {piece!r} with the log-probability {score}: choose text, and at most 0")
        self.pieces = {piece: score for piece, score in pieces.items() if score > -math.inf}
        self.longest = max(map(len, self.pieces), default=0)

    def shortest(self, words: Sequence[str], most: int | None = None) -> Path:
        """The shortest path through words that follow each other, of at most `most` pieces; none crosses words.

        Args:
            words: The parts of a text.
            most: The largest number of pieces; None for any.

        Returns:
            The path, as of `shortest_path`.

        Raises:
            ValueError: As `shortest_path`.
        """
        if most is not None:
            check_count("most", most, 0)
        edges, text = self._edges(words), "".join(words)
        path = _viterbi(edges, text)
        if path is None:
            raise ValueError(f"text is {text[:40]!r}, which the pieces do not make up: add single characters to them")
        if most is None or len(path.pieces) <= most:
            return path
        bounded = _rounds(edges, text, most)
        if bounded is None:
            fewest = _viterbi([[(end, 1.0) for end, _ in ends] for ends in edges], text)
            least = len(fewest.pieces) if fewest else 0
            raise ValueError(f"most is {most}, but {text[:40]!r} takes {least} pieces: choose at least that many")
        return bounded

    def summed(self, words: Sequence[str], mass: float = 0.0) -> float:
        """log of the sum over all paths of the product of their probabilities: the forward algorithm.

        Args:
            words: The parts of a text, which no piece crosses.
            mass: What is taken off every log-probability, such as the log of their sum if that is not 1.

        Returns:
            The log-probability in nats, -inf if there is no path.
        """
        edges = self._edges(words)
        reached: list[list[float]] = [[0.0]] + [[] for _ in edges]
        total = 0.0
        for start, ends in enumerate([*edges, []]):
            top = max(reached[start], default=-math.inf)
            total = top if top == -math.inf else top + math.log(sum(math.exp(x - top) for x in reached[start]))
            for end, cost in ends:
                reached[end].append(total - cost - mass)
        return total

    def _edges(self, words: Sequence[str]) -> Edges:
        edges = Edges()
        for word in words:
            offset = len(edges)
            for start in range(len(word)):
                ends = range(start + 1, min(len(word), start + self.longest) + 1)
                found = [(end, word[start:end]) for end in ends]
                edges.append([(offset + end, -self.pieces[piece]) for end, piece in found if piece in self.pieces])
        return edges


def _viterbi(edges: Edges, text: str) -> Path | None:
    """One pass in the order of positions finds the shortest path of any number of edges."""
    costs, before = [0.0] + [math.inf] * len(edges), [0] * (len(edges) + 1)
    for start, ends in enumerate(edges):
        for end, cost in ends:
            if costs[start] + cost < costs[end]:
                costs[end], before[end] = costs[start] + cost, start
    if costs[-1] == math.inf:
        return None
    cuts = [len(edges)]
    while cuts[-1]:
        cuts.append(before[cuts[-1]])
    return _along(cuts, text, costs[-1])


def _rounds(edges: Edges, text: str, most: int) -> Path | None:
    """Bellman and Ford's rounds: after round k, the shortest paths of exactly k edges from the start."""
    costs, rounds = [0.0] + [math.inf] * len(edges), list[list[int]]()
    best, length = math.inf, 0
    for k in range(1, most + 1):
        longer, before = [math.inf] * (len(edges) + 1), [0] * (len(edges) + 1)
        for start, ends in enumerate(edges):
            if costs[start] < math.inf:
                for end, cost in ends:
                    if costs[start] + cost < longer[end]:
                        longer[end], before[end] = costs[start] + cost, start
        rounds.append(before)
        costs = longer
        if costs[-1] < best:
            best, length = costs[-1], k
    if best == math.inf:
        return None
    cuts = [len(edges)]
    for before in reversed(rounds[:length]):
        cuts.append(before[cuts[-1]])
    return _along(cuts, text, best)


def _along(cuts: list[int], text: str, cost: float) -> Path:
    """The path through positions that are given from the last to the first."""
    return Path(tuple(text[start:end] for start, end in pairwise(reversed(cuts))), cost)

"""Candidates as prefix trees, so that words that several of them begin with are read once.

    the pound key         the ─ pound ─ key           a node is a token that is read, an edge a token that is predicted
    the pound sign             └─────── sign          after it: the last token of a candidate is never read

A tree is a row of tokens under a mask of its own: a token attends to its ancestors and itself, and its position is its
depth. Without branches a tree is a chain, the usual row of a batch, for which the causal mask is enough. Trees and
batches of them are the same for every source, so they are made once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Edges:
    """Tokens that are predicted, and the candidates that contain them.

    Args:
        rows: The flat position [E] of each one's prediction among the logits of the batch.
        tokens: The token [E] itself.
        edges: The edges [M] of candidates, with repetitions.
        candidates: The candidate [M] of each.
    """

    rows: Tensor
    tokens: Tensor
    edges: Tensor
    candidates: Tensor


@dataclass(frozen=True)
class Pack:
    """A batch of B trees of at most N nodes, padded on the right.

    Args:
        ids: Tokens [B, N].
        depths: The number of ancestors [B, N] of each node.
        visible: Whether a node [B, N, N] attends to another one of its tree; None if the trees are chains.
        edges: What the nodes predict.
    """

    ids: Tensor
    depths: Tensor
    visible: Tensor | None
    edges: Edges


@dataclass
class Tree:
    """A prefix tree: its nodes in the order in which they were added, so that ancestors come first."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)  # -1 for those that follow the source
    edges: dict[tuple[int, int], list[int]] = field(default_factory=dict)  # (node, token) -> candidates
    nodes: dict[Tokens, int] = field(default_factory=dict)  # the beginning of a candidate -> its last token's node

    def added(self, tokens: Tokens) -> int:
        """How many nodes the tree has with one more candidate."""
        return len(self.nodes) + sum(tokens[:n] not in self.nodes for n in range(1, len(tokens)))

    def add(self, tokens: Tokens, candidate: int) -> None:
        """Add a candidate. Its first token is predicted by the source, so it has no edge here."""
        node = -1
        for depth in range(1, len(tokens)):
            beginning = tokens[:depth]
            if beginning not in self.nodes:
                self.nodes[beginning] = len(self.tokens)
                self.tokens.append(tokens[depth - 1])
                self.parents.append(node)
            node = self.nodes[beginning]
            self.edges.setdefault((node, tokens[depth]), []).append(candidate)


def first_tokens(candidates: Sequence[Tokens]) -> Edges:
    """What the end of a source predicts: the first token of every candidate."""
    edges: dict[tuple[int, int], list[int]] = {}
    for i, tokens in enumerate(candidates):
        edges.setdefault((0, tokens[0]), []).append(i)
    return _edges([edges], 1)


def packs(candidates: Sequence[Tokens], width: int, batch_tokens: int) -> list[Pack]:
    """Batches of trees that contain every candidate once.

    Args:
        candidates: Their tokens, without repetitions.
        width: The most nodes of a tree of several candidates; 0 gives each candidate a chain of its own.
        batch_tokens: The most tokens of a batch of several trees, padding included.
    """
    trees = sorted(_trees(candidates, width), key=lambda tree: len(tree.tokens))
    found, start = [], 0
    for end in range(1, len(trees) + 1):
        longer = end < len(trees) and (end + 1 - start) * len(trees[end].tokens) > batch_tokens
        if longer or end == len(trees):
            found.append(_pack(trees[start:end], branched=width > 0))
            start = end
    return found


def _trees(candidates: Sequence[Tokens], width: int) -> Iterator[Tree]:
    """Trees of neighbours in alphabetical order, which share the most."""
    tree = Tree()
    for i in sorted(range(len(candidates)), key=candidates.__getitem__):
        if tree.tokens and tree.added(candidates[i]) > width:
            yield tree
            tree = Tree()
        tree.add(candidates[i], i)
    if tree.tokens:
        yield tree


def _pack(trees: Sequence[Tree], branched: bool) -> Pack:
    length = max(len(tree.tokens) for tree in trees)
    ids, depths = torch.zeros(2, len(trees), length, dtype=torch.long)
    visible = torch.eye(length, dtype=torch.bool).repeat(len(trees), 1, 1)  # padding sees itself: no row without keys
    for i, tree in enumerate(trees):
        ids[i, : len(tree.tokens)] = torch.tensor(tree.tokens)
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                visible[i, node] |= visible[i, parent]
                depths[i, node] = depths[i, parent] + 1
    return Pack(ids, depths, visible if branched else None, _edges([tree.edges for tree in trees], length))


def _edges(trees: Sequence[dict[tuple[int, int], list[int]]], length: int) -> Edges:
    """The edges of several trees, whose nodes are rows of `length` positions."""
    flat = [
        (i * length + node, token, members) for i, tree in enumerate(trees) for (node, token), members in tree.items()
    ]
    rows, tokens = ([edge[k] for edge in flat] for k in (0, 1))
    pairs = [(edge, candidate) for edge, (_, _, members) in enumerate(flat) for candidate in members]
    edges, candidates = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T.contiguous()
    return Edges(torch.tensor(rows, dtype=torch.long), torch.tensor(tokens, dtype=torch.long), edges, candidates)

"""Attribution patching against activation patching, as a first-order estimate of it.

    clean, corrupted   two sequences that differ in one token
    metric m           logit of `answer` - logit of `other` after the last token
    activation         m(corrupted run whose residual stream before layer l at position p is that of the clean run)
                       - m(corrupted run), by a forward pass for each l and p
    attribution        gradient of m in the corrupted run at (l, p) . (clean - corrupted residual), by one backward
    error              mean |attribution - activation| / mean |activation| over pairs, layers and positions
    correlation        Pearson's, of the two over the same

Positions before the one that differs are left out, since both are zero there. The pairs are windows of held-out text
in which one of the last REACH tokens is replaced by the one at that position in another window; `answer` and `other`
are the most likely next tokens of the *original* model in both runs, and pairs where they agree are left out. So all
arms have the same pairs. The metric of a pair is divided by nothing: the ratio of sums is not moved by pairs without
an effect.

Source: Baroni et al. 2025, arXiv:2507.02559, patch the residual stream of GPT-2 small on names in pairs of sentences,
which a model of this size cannot do; their measure is the absolute difference relative to the effect of a full patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LENGTH, REACH = 16, 8


@dataclass(frozen=True)
class Pairs:
    """Token ids [N, T] of both sequences, the position that differs [N], and the two next tokens [N, 2]."""

    clean: Tensor
    corrupted: Tensor
    position: Tensor
    answers: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, blocks: Tensor, count: int, seed: int) -> Pairs:
        """At most `count` pairs on which the original model's most likely next tokens differ."""
        draw = torch.Generator().manual_seed(seed)
        length = min(LENGTH, blocks.shape[1])
        windows = blocks.unfold(1, length, length).flatten(0, 1)
        windows = windows[torch.randperm(len(windows), generator=draw)[: 4 * count]]
        position = torch.randint(max(1, length - REACH), length, (len(windows),), generator=draw)
        corrupted, rows = windows.clone(), torch.arange(len(windows))
        corrupted[rows, position] = windows.roll(1, 0)[rows, position]
        best = [torch.cat([model(ids).logits[:, -1].argmax(-1) for ids in x.split(64)]) for x in (windows, corrupted)]
        kept = (best[0] != best[1]).nonzero()[:count, 0]
        return cls(windows[kept], corrupted[kept], position[kept], torch.stack(best, 1)[kept])


@dataclass
class Patching:
    """The two quantities [entries, ...] of all pairs, with the layer of each."""

    activation: Tensor
    attribution: Tensor
    layer: Tensor

    @property
    def error(self) -> float:
        """Relative to the mean effect."""
        return float((self.attribution - self.activation).abs().mean() / self.activation.abs().mean())

    @property
    def correlation(self) -> float:
        """Pearson's."""
        return float(torch.corrcoef(torch.stack([self.activation, self.attribution]))[0, 1])

    def by_layer(self) -> list[float]:
        """The error of each layer."""
        return [
            float((self.attribution - self.activation)[at].abs().mean() / self.activation[at].abs().mean())
            for at in (self.layer == layer for layer in self.layer.unique())
        ]


def patched(model: Any, pairs: Pairs, batch_size: int = 64) -> Patching:
    """Both kinds of patching in a GPT-2, float32 and evaluation mode."""
    columns = (pairs.clean, pairs.corrupted, pairs.position, pairs.answers)
    batches = zip(*(x.split(batch_size) for x in columns), strict=True)
    parts = [_of_batch(model, Pairs(*batch)) for batch in batches]
    return Patching(*(torch.cat(x) for x in zip(*parts, strict=True)))


def _of_batch(model: Any, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    layers = list(model.transformer.h)
    with _kept(layers) as clean, torch.no_grad():
        _metric(model, pairs.clean, pairs.answers)
    with _kept(layers) as corrupted, torch.enable_grad():
        before = _metric(model, pairs.corrupted, pairs.answers)
        gradients = torch.autograd.grad(before.sum(), corrupted)
    counted = pairs.position[:, None] <= torch.arange(pairs.clean.shape[1])  # [B, T]
    first = int(pairs.position.min())
    found = []
    for i, layer in enumerate(layers):
        change = (clean[i] - corrupted[i]).detach()
        estimate = (gradients[i] * change).sum(-1)
        for position in range(first, pairs.clean.shape[1]):
            with _added(layer, change, position), torch.no_grad():
                effect = _metric(model, pairs.corrupted, pairs.answers) - before.detach()
            at = counted[:, position]
            found.append((effect[at], estimate[at, position], torch.full((int(at.sum()),), i)))
    return tuple(torch.cat(x) for x in zip(*found, strict=True))  # type: ignore[return-value]


def _metric(model: Any, ids: Tensor, answers: Tensor) -> Tensor:
    hidden = model.transformer(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
    head = model.lm_head.weight
    return ((head[answers[:, 0]] - head[answers[:, 1]]) * hidden).sum(-1)


@contextmanager
def _kept(layers: list[Any]) -> Iterator[list[Tensor]]:
    """The residual streams before the layers, in a list that the forward pass fills."""
    kept: list[Tensor] = []

    def keep(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0] if args[0].requires_grad or not torch.is_grad_enabled() else args[0].requires_grad_()
        kept.append(x)
        return (x, *args[1:])

    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _added(layer: Any, change: Tensor, position: int) -> Iterator[None]:
    """Adds a change to the residual stream before a layer at one position."""

    def add(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].clone()
        x[:, position] += change[:, position]
        return (x, *args[1:])

    handle = layer.register_forward_pre_hook(add)
    try:
        yield
    finally:
        handle.remove()

"""The state that all lazy logits of a patched model share, and the shift that turns a model's labels into targets."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..ops import Stats
from ..ops.request import Request
from ..ops.rows import token_ids

_LOCK = Lock()  # replicas of a model add to one state, each from its thread


class TokenSums(dict[bool, dict[str, Tensor]]):
    """Sums of observed statistics over tokens, by the model's mode (True is training), since they were last taken."""

    def add(self, stats: Stats, training: bool) -> None:
        """Add all valid tokens of a forward pass in that mode."""
        new = {"tokens": stats.mask.sum(), "nll": stats.nll.sum()}
        if "entropy" in stats.values:
            new["entropy"] = stats.entropy.sum()
        if "top" in stats.values:
            new["correct"] = stats.is_top1.sum()
        sums = self.get(training, {})
        for name in new.keys() & sums.keys():
            new[name] = sums[name] + new[name].to(sums[name].device)  # replicas are on several devices
        self[training] = new

    def take(self, training: bool) -> dict[str, Tensor]:
        """The sums of that mode, which start again at zero: tokens, nll, entropy, correct."""
        return self.pop(training, {})


@dataclass
class PatchState:
    """The options of a patched model's lazy logits, and the counts and sums over tokens that they update."""

    request: Request = field(default_factory=Request)
    """How losses are computed, and which statistics are summed beside them."""
    streamed: int = 0
    """How many losses and other results were computed without logits."""
    materialized: int = 0
    """How many dense tensors were computed."""
    bypassed: int = 0
    """How many calls, for a loss or in training, computed their logits at once."""
    reason: str = ""
    """Why the last of these calls did so; also set when torch.compile traces a call, which cannot be counted."""
    operation: str = ""
    """The last torch function that needed the values of lazy logits."""
    training: bool = True
    """The model's mode in its last forward."""
    sums: TokenSums = field(default_factory=TokenSums)
    """Sums over tokens, by mode, if anything is observed."""

    @property
    def observe(self) -> tuple[str, ...]:
        """Names of statistics that are summed beside the loss."""
        return self.request.observe

    @property
    def options(self) -> dict[str, Any]:
        """How the vocabulary is streamed, as keywords of public functions: impl, memory_budget."""
        return {"impl": self.request.impl, "memory_budget": self.request.memory_budget}

    @property
    def tail(self) -> float:
        """Relative error allowed in the gradient of the logits."""
        return self.request.tail

    @property
    def why_dense(self) -> str:
        """Why no loss was computed without logits; empty if one was, or if none was requested."""
        if self.streamed:
            return ""
        cause = "what follows the head (an adapter on it, or an unusual operation) needs the logits' values"
        cause += f", for {self.operation}" if self.operation else ""
        return self.reason or (cause if self.materialized else "")

    def record(self, stats: Stats) -> None:
        """Count a loss computed without logits, and add its tokens to the sums if anything is observed."""
        with _LOCK:
            self.streamed += 1
            if self.observe:
                self.sums.add(stats, self.training)

    def bypass(self, reason: str) -> None:
        """Count a call that computed its logits at once, and keep the reason."""
        with _LOCK:
            self.bypassed, self.reason = self.bypassed + 1, reason

    def take(self, *, training: bool = True) -> dict[str, Tensor]:
        """The sums over tokens seen in that mode since the last call: tokens, nll, entropy, correct."""
        return self.sums.take(training)


Seam = PatchState  # the earlier name


def next_token_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Labels shifted by one to the left, so that each position has its target; the last position is ignored.

    Args:
        labels: The model's own labels, [B, T].
        ignore_index: The label of positions to ignore.

    Returns:
        Labels [B, T], int64, aligned with the logits.

    Raises:
        ValueError: Labels are not integers.
    """
    return F.pad(token_ids(labels), (0, 1), value=ignore_index)[..., 1:].contiguous()

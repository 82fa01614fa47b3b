"""What all lazy logits of one model share, and the shift that turns a model's labels into targets."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ..ops import Stats
from ..ops.rows import token_ids

_ADDING = Lock()  # replicas of a model add to one seam from threads of their own


@dataclass
class Seam:
    """What the lazy logits of one model share: options on the way down, counts and token sums on the way up."""

    observe: tuple[str, ...] = ()  # statistics to collect beside the loss
    options: dict[str, Any] = field(default_factory=dict)  # impl, memory_budget
    tail: float = 0.0  # relative error allowed to the loss's gradient by logits
    streamed: int = 0  # consumers answered without logits
    materialized: int = 0  # dense tensors made
    bypassed: int = 0  # calls for a loss, or in training, in which the head made its logits at once
    reason: str = ""  # why it did so, the last time; also where torch.compile traced the call, which cannot be counted
    training: bool = True  # the model's mode in its last forward
    sums: dict[bool, dict[str, Tensor]] = field(default_factory=dict)  # by mode, over tokens since the last `take`

    @property
    def why_dense(self) -> str:
        """Why no loss was computed without logits; empty if one was, or the model was not asked for any."""
        if self.streamed:
            return ""
        used = "what follows the head (an adapter on it, or an unusual operation) needs the logits' values"
        return self.reason or (used if self.materialized else "")

    def record(self, stats: Stats) -> None:
        """Count a streamed consumer, and add its tokens to the sums if anything is observed."""
        with _ADDING:
            self._record(stats)

    def bypass(self, reason: str) -> None:
        """Count a call that made its logits at once."""
        with _ADDING:
            self.bypassed, self.reason = self.bypassed + 1, reason

    def _record(self, stats: Stats) -> None:
        self.streamed += 1
        if not self.observe:
            return
        found = {"tokens": stats.mask.sum(), "nll": stats.nll.sum()}
        if "entropy" in stats.values:
            found["entropy"] = stats.entropy.sum()
        if "top" in stats.values:
            found["correct"] = stats.is_top1.sum()
        before = self.sums.get(self.training, {})
        for name in found.keys() & before.keys():
            found[name] = before[name] + found[name].to(before[name].device)  # replicas lie on several devices
        self.sums[self.training] = found

    def take(self, *, training: bool = True) -> dict[str, Tensor]:
        """The sums over tokens seen in that mode since the last call: tokens, nll, entropy, correct."""
        return self.sums.pop(training, {})


def next_token_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Labels [B, T] moved one to the left: what position t has to predict; the last position is ignored."""
    return F.pad(token_ids(labels), (0, 1), value=ignore_index)[..., 1:].contiguous()

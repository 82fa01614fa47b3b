"""The state that all lazy logits of a patched model share, and the shift that turns a model's labels into targets."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import Stats
from ..ops.compiled import LIBRARY
from ..ops.request import Request
from ..ops.rows import token_ids

_LOCK = Lock()  # replicas of a model add to one state, each from its thread
_KEYS = count()
_STATES: WeakValueDictionary[int, PatchState] = WeakValueDictionary()  # a compiled program names a state by its key


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
    always: int = 0
    """How many callers want lazy logits without labels, for losses outside of the model; then what they do to the
    logits is recorded (`hf_xent.lazy.expressions`)."""
    sums: TokenSums = field(default_factory=TokenSums)
    """Sums over tokens, by mode, if anything is observed."""
    traced_objective: Any = None
    """The objective of the call that torch.compile traces (`objective.Objective`)."""
    key: int = field(init=False, repr=False, compare=False)
    """What names this state in a compiled program; copies have another one."""

    def __post_init__(self) -> None:
        self.key = next(_KEYS)
        _STATES[self.key] = self

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        self.__post_init__()

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

    def counted(self, loss: Tensor, stats: Stats) -> Tensor:
        """The loss itself, after `record`; a compiled program records each time it runs, not when it is traced."""
        if not torch.compiler.is_compiling():
            self.record(stats)
            return loss
        names = [name for name in stats.values if name in ("lse", "target", "entropy", "top")] if self.observe else []
        values = [stats.values[name] for name in names]
        joined = ",".join(names)  # torch takes the gradients of an operator with two lists in no consistent form
        return torch.ops.hf_xent.counted(loss, stats.labels, stats.mask, values, joined, self.training, self.key)

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


def _counted(
    loss: Tensor, labels: Tensor, mask: Tensor, values: list[Tensor], names: str, training: bool, key: int
) -> Tensor:
    """The operator `hf_xent::counted`: a copy of the loss, after the state of this key has counted it, if it exists."""
    state = _STATES.get(key)
    if state is not None:
        state.training = training
        state.record(Stats(dict(zip(names.split(","), values, strict=False)), labels, mask))
    return loss.clone()


def _save_count(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.count = len(inputs[3])


def _counted_gradients(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    return upstream, None, None, [None] * ctx.count, None, None, None


LIBRARY.define(
    "counted(Tensor loss, Tensor labels, Tensor mask, Tensor[] values, str names, bool training, int key) -> Tensor"
)
LIBRARY.impl("counted", _counted, "CompositeExplicitAutograd")
torch.library.register_fake("hf_xent::counted", lambda loss, *_: torch.empty_like(loss), lib=LIBRARY)
torch.library.register_autograd("hf_xent::counted", _counted_gradients, setup_context=_save_count, lib=LIBRARY)

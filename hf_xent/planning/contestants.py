"""What the heads of libraries hold beside hidden states, their gradient, and that of the head, when each is known.

    stock     all logits, in float32 too, and their gradient: from the trace of the step itself
    TRL       a tile of 4096 tokens by 32768 columns; in the backward float32 buffers of both gradients
    Liger     a chunk of tokens of about N D / V rows; both gradients are made in the forward and kept
    CCE       no logits; both gradients are made in the backward
    hf_xent   logits within its memory budget; both gradients are made in the forward and kept

Source: their code (TRL 1.16, Liger 0.8.5, cut-cross-entropy 25.1.1), held to the peaks measured on an H200
(benchmarks/results/nvidia-h200.csv), and for TRL on a CPU (benchmarks/results/amd-epyc.csv).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..ops import Head
from ..ops.chunked import GPU_LOW_PRECISION_SUMS, MAX_LOW_PRECISION_SUMS
from ..ops.request import default_budget
from ..ops.tail import GROUPS
from .settings import Settings

TRL_ROWS, TRL_COLUMNS = 4096, 32768


@dataclass(frozen=True)
class HeadShape:
    """The head of a model, and the dtype that it is multiplied in."""

    vocabulary: int
    width: int
    itemsize: int  # bytes of a logit, and of a number of the hidden states
    trained: bool

    @property
    def weight(self) -> int:
        """Bytes of the head's weight, and of its gradient if it is trained."""
        return self.vocabulary * self.width * self.itemsize

    def hidden(self, tokens: float) -> float:
        """Bytes of the hidden states, and of their gradient."""
        return tokens * self.width * self.itemsize


@dataclass(frozen=True)
class Held:
    """Bytes beside the hidden states' and the head's gradient."""

    forward: float  # at the most in the head's forward
    backward: float  # at the most in its backward
    early: bool = False  # whether both gradients exist from the forward on


Contestant = Callable[[HeadShape, float, Settings], Held]


def trl(head: HeadShape, tokens: float, settings: Settings) -> Held:
    """TRL's fused head."""
    tile = min(tokens, TRL_ROWS) * min(head.vocabulary, TRL_COLUMNS) * head.itemsize
    numbers = tokens * head.width + head.vocabulary * head.width * head.trained
    wide = 4 * numbers if head.itemsize < 4 else 0
    return Held(tile, tile + wide)


def liger(head: HeadShape, tokens: float, settings: Settings) -> Held:
    """Liger's fused linear cross-entropy."""
    chunks = -(-head.vocabulary // head.width)
    rows = min(tokens, 2 ** max(0, int(-(-tokens // chunks)) - 1).bit_length())
    return Held(rows * head.vocabulary * head.itemsize, 0, early=True)


def cut_cross_entropy(head: HeadShape, tokens: float, settings: Settings) -> Held:
    """Apple's cut cross-entropy: numbers of tokens alone."""
    return Held(8 * tokens, 8 * tokens)


def hf_xent(head: HeadShape, tokens: float, settings: Settings) -> Held:
    """This package."""
    cpu, itemsize = settings.device == "cpu", head.itemsize
    weight = torch.empty(1, device="cpu" if cpu else "meta").expand(head.vocabulary, head.width)
    budget = settings.memory_budget or default_budget(Head(weight), int(tokens), itemsize)
    logits = min(budget, tokens * head.vocabulary * itemsize)
    wide_hidden = tokens * head.width * 4
    chunks = tokens * head.vocabulary * itemsize / budget
    if itemsize < 4 and chunks > (MAX_LOW_PRECISION_SUMS if cpu else GPU_LOW_PRECISION_SUMS):
        logits += wide_hidden  # two visits, and the gradient of hidden states is summed over columns
    if settings.tail:
        logits = max(logits + (GROUPS + 1) * head.vocabulary * 4, logits * 2 / 3 + 2 * wide_hidden)
    return Held(logits, 0, early=True)


CONTESTANTS: dict[str, Contestant] = {
    "TRL": trl,
    "Liger": liger,
    "cut-cross-entropy": cut_cross_entropy,
    "hf_xent": hf_xent,
}
"""Name -> what it holds; the stock step needs no formula."""

"""The functions of the contestants: mean cross-entropy, or another objective, of `hidden @ weight.T` with labels.

Each returns the scalar loss with its graph; `iterate` adds the backward. All get these leaves: hidden [N, D] and weight
[V, D] in the run's dtype, labels [N] without ignored positions. `matmuls` has neither a loss nor gradients: it is the
matmuls that every method needs. Libraries are imported by the functions that measure them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..losses.base import Loss
from ..losses.cross_entropy import CrossEntropy
from ..ops import Head, Stats, map_logits, vocab_stats
from .objectives import BONUS, OBJECTIVES, PLAIN

Method = Callable[..., Tensor]


def iterate(loss: Method, hidden: Tensor, weight: Tensor, labels: Tensor, **setting: Any) -> Tensor:
    """One iteration: the detached loss, with fresh gradients in `hidden.grad` and `weight.grad`."""
    hidden.grad = weight.grad = None
    value = loss(hidden, weight, labels, **setting)
    if value.requires_grad:  # all but the floor
        value.backward()
    return value.detach()


def dense(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Plain torch: all logits at once, in the inputs' dtype."""
    return F.cross_entropy(F.linear(hidden, weight), labels)


def dense_float32(hidden: Tensor, weight: Tensor, labels: Tensor, objective: str = PLAIN) -> Tensor:
    """Plain torch with float32 logits, as transformers computes its loss; of any objective."""
    return OBJECTIVES[objective].on_logits(F.linear(hidden, weight).float(), labels).mean()


def compiled(hidden: Tensor, weight: Tensor, labels: Tensor, objective: str = PLAIN, chunked: bool = False) -> Tensor:
    """Plain torch under torch.compile, default mode; or with Inductor's automatic chunks."""
    return _compile(objective, chunked, hidden.shape, weight.shape, hidden.dtype)(hidden, weight, labels)


@lru_cache(maxsize=1)
def _compile(objective: str, chunked: bool, *inputs: object) -> Method:
    """A function that is compiled for these inputs, the only one that there is: torch gives up on the ninth of one."""
    torch.compiler.reset()

    def other(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return dense_float32(hidden, weight, labels, objective)

    options: dict[str, Any] | None = (
        {"auto_chunker.enable": True} if chunked else None
    )  # what TORCHINDUCTOR_AUTO_CHUNKER=1 sets
    return torch.compile(dense if objective == PLAIN else other, dynamic=False, options=options)


def torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Torch's chunked loss (since 2.13); without options, torch chooses the chunks ('auto')."""
    return F.linear_cross_entropy(hidden, weight, labels, options=torch.nn.LinearCrossEntropyOptions(**options))


def trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """TRL's fused head as its trainers call it, with log-probabilities as its only output."""
    from trl.kernels import ChunkedLogProbFunction

    # bias, targets, temperature, vocabulary tile (as trl.trainer.utils sets it), softcap, scale, outputs
    return -ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, None, 1.0, ())[0].mean()


def liger(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(**options)(weight, hidden, labels)


def cut(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Apple's cut cross-entropy; by default its gradients leave out entries below its filter."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, labels, **options)


def quack(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Quack's chunked linear cross-entropy, with its default chunks.

    The forward computes the gradients, three matmuls.
    """
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, labels)


@torch.no_grad()
def matmuls(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, logits: Tensor, hidden_out: Tensor, weight_out: Tensor
) -> Tensor:
    """The three matrix products of the shape and nothing else: a lower bound for the time of a loss with gradients."""
    torch.mm(hidden, weight.T, out=logits)
    torch.mm(logits, weight, out=hidden_out)
    torch.mm(logits.T, hidden, out=weight_out)
    return hidden.detach()[0, 0]  # a scalar, as for the others; a view of the logits would keep all of them alive


def matmul_outputs(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The tensors that `matmuls` writes to, filled so that the first access to a memory page is not timed."""
    sizes = {"logits": (len(hidden), len(weight)), "hidden_out": hidden.shape, "weight_out": weight.shape}
    return {name: hidden.new_ones(size) for name, size in sizes.items()}


@dataclass(frozen=True)
class EntropyBonus(Loss):
    """Cross-entropy less a share of the entropy, per token, nats."""

    share: float = BONUS
    uses = ("lse", "target", "entropy")

    def of(self, stats: Stats) -> Tensor:
        """Per-token loss [N]."""
        return stats.nll - self.share * stats.entropy


def eager(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    impl: str = "chunked",
    tail: float = 0.0,
    loss: Loss = CrossEntropy(),  # noqa: B008  # a frozen dataclass
    softcap: float | None = None,
) -> Tensor:
    """Our loss as `patch` uses it: exact gradients with three matmuls, or compressed ones with little more than one."""
    return loss(hidden, Head(weight, softcap=softcap), labels, impl=impl, tail=tail)


def recompute(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Our loss for any function of the statistics: the backward recomputes the logits, four matmuls."""
    return vocab_stats(hidden, Head(weight), labels, outputs=("lse", "target"), impl="chunked").nll.mean()


def recompute_bonus(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The entropy bonus as a function of the statistics."""
    stats = vocab_stats(hidden, Head(weight), labels, outputs=("lse", "target", "entropy"), impl="chunked")
    return (stats.nll - BONUS * stats.entropy).mean()


def mapped(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Our loss for functions of whole rows of logits, in checkpointed chunks."""
    return map_logits(lambda z, y: F.cross_entropy(z, y, reduction="none"), hidden, Head(weight), labels).mean()

"""`token_logprobs`: log-probability and entropy of every token, what trainers of reinforcement learning ask a head for.

    logp_t = z_ty / T - lse_t          entropy_t = -sum_j p_tj log p_tj          p_t = softmax(z_t / T)

Both are functions of the statistics, so that any loss may follow: importance ratios, an entropy bonus, a divergence
from a reference. The backward visits the logits once more, whatever the loss.
"""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from .dispatch import stream_stats
from .head import Head
from .panels import Panels
from .request import Request
from .rows import ignored_id, token_ids
from .shard import Shard


def token_logprobs(
    hidden: Tensor,  # [..., D]
    head: Head | Tensor,  # a head, or its weight [V, D]
    labels: Tensor,  # [...]
    *,
    temperature: float | Tensor = 1.0,  # one number, or [...]
    entropy: bool = True,
    fp32: bool = False,
    group: Any = None,  # torch.distributed.ProcessGroup
    ignore_index: int = -100,
    impl: str | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of every label, and the entropy of every token's distribution, without logits.

    Both are differentiable, together and any number of times (mode *recompute* of `vocab_stats`: four matmuls in all).

    Args:
        hidden: The hidden states that the head is applied to, [..., D]; with `group`, the same on every rank.
        head: A head, or its weight [V, D]; with `group`, this rank's rows of it.
        labels: Token ids of the whole vocabulary, aligned with `hidden` (not shifted here), [...].
        temperature: What logits are divided by, > 0: one number, or a tensor [...] with one per token, by which hidden
            states are divided in their dtype; such a tensor may require a gradient.
        entropy: Whether to compute the entropy; its gradient costs nothing if no loss uses it.
        fp32: Whether 16-bit hidden states and weights are multiplied, and the products summed, in float32. A panel of
            the weight is converted at a time, and autocast does not apply.
        group: The process group over whose ranks the vocabulary is split, in order: as many rows on each, fewer on the
            last. The ranks agree on the sizes in each call; a head with a `Shard` saves that.
        ignore_index: The label of positions to ignore, whose results are 0.
        impl: 'reference', 'chunked' or 'triton', as in `vocab_stats`.
        memory_budget: Bytes of logits in memory at a time, as in `vocab_stats`.

    Returns:
        Log-probabilities and entropies in nats, in the shape of labels, float32 (float64 for float64 inputs); None in
        place of the entropies without `entropy`.

    Raises:
        ValueError: As in `vocab_stats`; or the temperature is not positive, the head is split already, or its parts are
            not equal.

    Source: the interface is that of `linear_cross_entropy` in verl (Sheng et al. 2024, HybridFlow, arXiv:2409.19256).
    """
    head, labels = _head_of(head, fp32, group), token_ids(labels)
    if isinstance(temperature, Tensor):
        hidden, head = _tempered_rows(hidden, head, labels != ignored_id(ignore_index), temperature)
    else:
        head = head.tempered(_positive(temperature))
    request = Request(ignore_index=ignore_index, impl=impl, memory_budget=memory_budget)
    stats = stream_stats(hidden, head, labels, ("lse", "target", *["entropy"] * entropy), request)
    return stats.logp, stats.entropy if entropy else None


def _head_of(head: Any, fp32: bool, group: Any) -> Head:
    """The head from what the caller passed."""
    if not isinstance(head, Head | Tensor | Panels):
        raise ValueError(
            f"head is a {type(head).__name__}: pass its weight [V, D], or a hf_xent.Head of its weight and bias"
        )
    head = head if isinstance(head, Head) else Head(head)
    head = replace(head, fp32=True) if fp32 else head
    return head if group is None else replace(head, shard=_shard(head, group))


def _positive(temperature: Any) -> float:
    """One temperature for all tokens. Raises: ValueError if it is not a finite number above 0."""
    number = float(temperature) if not isinstance(temperature, bool) and isinstance(temperature, Real) else math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"temperature is {temperature!r}: pass a finite number > 0, or a tensor shaped like labels")
    return number


def _tempered_rows(hidden: Tensor, head: Head, valid: Tensor, temperature: Tensor) -> tuple[Tensor, Head]:
    """Hidden states and a head whose logits are divided by one temperature per token [...]; a bias becomes a column."""
    if head.softcap is not None:
        raise ValueError(
            f"temperature has one number per token, but the head has softcap {head.softcap}: pass one number for all"
        )
    if (temperature.ndim and temperature.shape != valid.shape) or temperature.device != hidden.device:
        raise ValueError(
            f"temperature has shape {tuple(temperature.shape)} on {temperature.device}: pass one number, or one per"
            f" label, {tuple(valid.shape)}, on {hidden.device}"
        )
    temperature = torch.where(valid, temperature, 1.0)  # an ignored token's may be 0
    if not bool(((temperature > 0) & (temperature < torch.inf)).all()):
        raise ValueError(f"temperature is down to {temperature.min().item()}: pass finite numbers > 0")
    hidden = hidden.to(head.dtype_for(hidden.dtype))
    factor = temperature.reciprocal()[..., None]
    features, bias = [(hidden * factor).to(hidden.dtype)], head.bias
    if bias is None:
        return features[0], head
    features.append(factor.to(hidden.dtype).expand(*hidden.shape[:-1], 1))
    columns = [x for x in (head.adapter, bias[:, None]) if x is not None]
    return torch.cat(features, -1), replace(head, bias=None, adapter=torch.cat(columns, 1))


def _shard(head: Head, group: Any) -> Shard:
    """This rank's part of a vocabulary that is split over a group; the sizes of all parts are gathered."""
    if head.shard is not None:
        raise ValueError("group is given, but the head has a shard, which has its own group: pass one of them")
    size, ranks = head.size, group.size()
    sizes = torch.tensor([size], device=head.weight.device).repeat(ranks)
    dist.all_gather(list(sizes.split(1)), torch.tensor([size], device=head.weight.device), group=group)
    found = sizes.tolist()
    shard = Shard(group, group.rank() * -(-sum(found) // ranks), sum(found))
    expected = [min(shard.width, max(0, shard.size - rank * shard.width)) for rank in range(ranks)]
    if found != expected:
        raise ValueError(f"weight has {found} rows on the ranks of group: split it as {expected}, in order")
    return shard

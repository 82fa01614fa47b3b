"""The statistics of a softmax by name, and `Stats`, which holds them: one number per token each.

    z[t,j]  logits      p = softmax(z)      lse = log sum_j e^z      logp = z - lse

Statistics, states and accumulators are float32 (float64 for float64 inputs); hidden states and weights keep their
dtype. Shapes: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

DIFFERENTIABLE = ("lse", "target", "mean", "entropy", "variance", "payload")
FORWARD_ONLY = ("top", "rank", "log_sum_sq")
STATISTICS = DIFFERENTIABLE + FORWARD_ONLY


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and accumulators for inputs of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def widened(x: Tensor) -> Tensor:
    """Values in the dtype of statistics: float32, or their own if that is wider."""
    return x.to(wide(x.dtype))


def with_needed(outputs: Iterable[str]) -> frozenset[str]:
    """These statistics, and those that their gradients or values need."""
    wanted = {"lse", "target", *outputs}
    return frozenset(wanted | {"entropy"} if "variance" in wanted else wanted)


class Stats:
    """The statistics of every token's softmax, one number per token each: attributes in the shape of the labels.

        lse         log sum_j e^z_j, nats
        target      z_y, the label's logit
        mean        the mean of z over the vocabulary
        entropy     of p, nats
        variance    of logp under p, nats^2
        payload     the expectation of the second head's logits under p
        top         the arg max of z                                without gradient
        rank        how many logits exceed the label's              without gradient
        log_sum_sq  log sum_j p_j^2                                 without gradient

    Ignored positions hold 0. Only the statistics that were requested are present.

    Args:
        values: Statistics by name, each in the shape of the labels.
        labels: Token ids, [...].
        mask: Which positions have a label, [...]; False at ignored positions.

    Raises:
        AttributeError: For a statistic that was not computed; the message says how to ask for it.
    """

    lse: Tensor
    target: Tensor
    mean: Tensor
    entropy: Tensor
    variance: Tensor
    payload: Tensor
    top: Tensor
    rank: Tensor
    log_sum_sq: Tensor

    def __init__(self, values: Mapping[str, Tensor], labels: Tensor, mask: Tensor):
        self.values = dict(values)
        self.labels = labels
        self.mask = mask

    def __getattr__(self, name: str) -> Tensor:
        if name in self.__dict__.get("values", {}):
            return self.values[name]
        if name in STATISTICS:
            raise AttributeError(f"{name} was not computed: ask for it with outputs=({name!r}, ...)")
        raise AttributeError(f"Stats has no {name!r}; statistics are {', '.join(STATISTICS)}")

    @property
    def logp(self) -> Tensor:
        """Log-probability of the label, nats."""
        return self.target - self.lse

    @property
    def nll(self) -> Tensor:
        """Negative log-probability of the label, nats."""
        return self.lse - self.target

    @property
    def is_top1(self) -> Tensor:
        """Whether the label is the arg max of its logits; False at ignored positions."""
        return (self.top == self.labels) & self.mask

    def reshape(self, *shape: int) -> Stats:
        """The same statistics in another shape, for instance [B, T]."""
        values = {name: value.reshape(*shape) for name, value in self.values.items()}
        return Stats(values, self.labels.reshape(*shape), self.mask.reshape(*shape))

    def to(self, device: torch.device | str) -> Stats:
        """The same statistics on a device."""
        values = {name: value.to(device) for name, value in self.values.items()}
        return Stats(values, self.labels.to(device), self.mask.to(device))

    def detach(self) -> Stats:
        """The same statistics without a graph."""
        return Stats({name: value.detach() for name, value in self.values.items()}, self.labels, self.mask)

    def __repr__(self) -> str:
        return f"Stats({', '.join(self.values)}; shape={tuple(self.labels.shape)}, tokens={int(self.mask.sum())})"

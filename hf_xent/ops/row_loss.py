"""A loss of whole rows of several softmaxes, as sums over columns of their log-probabilities.

So written, it needs no more of a row than the columns at hand and the normalizers: a rank that has a part of the
vocabulary sums over that part, and the sums of all ranks are the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowLoss:
    """A sum over columns of a function of log-probabilities, for `divergences.stream_divergence`.

    Args:
        sums: (labels [n], log-probabilities [n, V] of each softmax) -> 'loss' [n], and whatever else is to be recorded,
            [n] each, by name. All are sums over columns, in the dtype of statistics; the loss is differentiable. Where
            the vocabulary is split, V are the columns of this rank and labels count from their first: `at_labels` reads
            an entry.
        softmaxes: Of each softmax, the number of the pass whose logits it is of (a second model comes after the
            passes), and the temperature.
    """

    sums: Callable[..., dict[str, Tensor]]
    softmaxes: tuple[tuple[int, float], ...]

    def log_probs(self, logits: list[Tensor]) -> list[Tensor]:
        """The log-probabilities of each softmax [n, V] from the logits of all passes, which have all columns."""
        found = {key: tempered(logits, key).log_softmax(-1) for key in self.softmaxes}
        return [found[key] for key in self.softmaxes]

    def __call__(self, labels: Tensor, *logits: Tensor) -> dict[str, Tensor]:
        """The sums over whole rows of logits [n, V], one of each pass."""
        return self.sums(labels, *self.log_probs([*logits]))


def tempered(logits: list[Tensor], softmax: tuple[int, float]) -> Tensor:
    """The logits that a softmax is of, divided by its temperature."""
    number, temperature = softmax
    return logits[number] if temperature == 1 else logits[number] / temperature


def at_labels(x: Tensor, labels: Tensor) -> Tensor:
    """Of each row of x [n, V] the label's entry [n]; 0 for a label that is none of these columns."""
    entry = x.gather(-1, labels.clamp(0, x.shape[1] - 1)[:, None]).squeeze(-1)
    return torch.where((labels >= 0) & (labels < x.shape[1]), entry, 0.0)

"""A loss of whole rows of several softmaxes, as sums over columns of their log-probabilities.

So written, it needs no more of a row than the columns at hand and the normalizers: a rank that has a part of the
vocabulary sums over that part, and the sums of all ranks are the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from .closed_form import Closed
from .rows import Rows


class Constants:
    """Base of the losses of tokens that have constants of their own: `rows`, one row of each per token."""

    rows: tuple[Tensor, ...]

    def __getitem__(self, tokens: slice) -> Self:
        """The same loss of some of the tokens that `rows` are of."""
        return self.with_rows(tuple(x[tokens] for x in self.rows))

    def of_valid(self, rows: Rows) -> Self:
        """The same loss of the tokens with a label, whose ids count from the first column of this rank."""
        start = 0 if rows.head.shard is None else rows.head.shard.start
        constants = [rows.select(x.detach(), trailing=x.ndim - rows.labels.ndim) for x in self.rows]
        return self.with_rows(tuple(x - start if start and x.dtype == torch.int64 else x for x in constants))

    def with_rows(self, rows: tuple[Tensor, ...]) -> Self:
        """The same loss with other constants."""
        changed: Self = replace(self, rows=rows)  # type: ignore[type-var]  # subclasses are dataclasses
        return changed


@dataclass(frozen=True)
class RowLoss(Constants):
    """A sum over columns of a function of log-probabilities, for `divergences.stream_divergence`.

    Args:
        sums: (labels [n], log-probabilities [n, V] of each softmax, rows [n, ...] of each tensor in `rows`) -> 'loss'
            [n], and whatever else is to be recorded, [n] each, by name. All are sums over columns, in the dtype of
            statistics; the loss is differentiable. Where the vocabulary is split, V are the columns of this rank and
            labels count from their first: `at_labels` and `at_ids` read entries.
        softmaxes: Of each softmax, the number of the pass whose logits it is of (a second model comes after the
            passes), and the temperature.
        rows: Constants of every token, in the shape of labels with any further dimensions. Those of dtype int64 are
            token ids, and count as labels do.
        closed: For a single pass and a second model: the same with the gradient as a formula, where autograd would need
            ten times the memory; `closed_form.Closed` tells how. None if there is none.
        knows: The statistics at temperature 1 of the first softmax that `closed` returns, too, by their names.
    """

    sums: Callable[..., dict[str, Tensor]]
    softmaxes: tuple[tuple[int, float], ...]
    rows: tuple[Tensor, ...] = ()
    closed: Closed | None = None
    knows: frozenset[str] = frozenset()

    def over(self, labels: Tensor, *logp: Tensor) -> dict[str, Tensor]:
        """The sums over the columns of log-probabilities [n, V], one of each softmax."""
        return self.sums(labels, *logp, *self.rows)

    def log_probs(self, logits: list[Tensor]) -> list[Tensor]:
        """The log-probabilities of each softmax [n, V] from the logits of all passes, which have all columns."""
        found = {key: tempered(logits, key).log_softmax(-1) for key in self.softmaxes}
        return [found[key] for key in self.softmaxes]

    def __call__(self, labels: Tensor, *logits: Tensor) -> dict[str, Tensor]:
        """The sums over whole rows of logits [n, V], one of each pass."""
        return self.over(labels, *self.log_probs([*logits]))


def tempered(logits: list[Tensor], softmax: tuple[int, float]) -> Tensor:
    """The logits that a softmax is of, divided by its temperature."""
    number, temperature = softmax
    return logits[number] if temperature == 1 else logits[number] / temperature


def at_labels(x: Tensor, labels: Tensor) -> Tensor:
    """Of each row of x [n, V] the label's entry [n]; 0 for a label that is none of these columns."""
    return at_ids(x, labels[:, None]).squeeze(-1)


def at_ids(x: Tensor, ids: Tensor) -> Tensor:
    """Of each row of x [n, V] the entries of its ids [n, k]; 0 for an id that is none of these columns."""
    entries = x.gather(-1, ids.clamp(0, x.shape[1] - 1))
    return torch.where((ids >= 0) & (ids < x.shape[1]), entries, 0.0)


def with_entries(x: Tensor, ids: Tensor, value: Tensor | float, *, split: bool) -> Tensor:
    """Rows of x [n, V] with other numbers [n, k], or one, at their ids [n, k]; if `split`, some are not among these."""
    if not split:
        return x.scatter(1, ids, value)
    size = x.shape[1]
    places = torch.where((ids >= 0) & (ids < size), ids, size)  # a column more takes what belongs to none
    return pad(x, (0, 1)).scatter_(1, places, value)[:, :size]

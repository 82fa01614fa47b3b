"""Batches with both classes.

    positives in a batch n+ = max(1, floor(rate B)), negatives n- = B - n+
    batches in an epoch     = max(positives // n+, negatives // n-)

Both classes are drawn without replacement; the smaller one is shuffled again when it is used up.

Source: the rule of LibAUC's DualSampler; its epochs, seeds, small classes and distributed use are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..options.ranges import is_integer, is_number


class DualSampler(Sampler[int]):
    """Row numbers, batch by batch, each with the same number of positives: for `DataLoader(batch_size=batch_size)`.

    Ranks take whole batches in turn, as accelerate distributes them, so every rank's batch has both classes. The order
    depends on `seed` and the epoch (`set_epoch`) alone; torch's global generator is not touched.

    Args:
        labels: 1 or 0 of every row of the data set [N].
        batch_size: Number of rows in a batch, at least 2.
        rate: Share of positives in a batch, in (0, 1); a batch has at least one.
        seed: Seed of the order.

    Raises:
        ValueError: A class is missing, or a batch has no room for both.
    """

    def __init__(self, labels: Sequence[int] | Tensor, batch_size: int, rate: float = 0.5, seed: int = 0):
        positive = torch.as_tensor(labels) > 0.5
        self.positives, self.negatives = positive.nonzero().squeeze(-1), (~positive).nonzero().squeeze(-1)
        if not (len(self.positives) and len(self.negatives)):
            raise ValueError(
                f"labels has {len(self.positives)} positives and {len(self.negatives)} negatives: pass both"
            )
        if not (is_integer(batch_size) and batch_size >= 2 and is_number(rate, "(0, 1)")):
            raise ValueError(f"batch_size is {batch_size}, rate {rate}: choose batch_size >= 2 and 0 < rate < 1")
        self.num_pos = max(1, int(rate * batch_size))
        self.num_neg = batch_size - self.num_pos
        self.seed, self.epoch = seed, 0
        self.batches = max(1, len(self.positives) // self.num_pos, len(self.negatives) // self.num_neg)

    def __len__(self) -> int:
        return self.batches * (self.num_pos + self.num_neg)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, on which the order of the rows depends."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)  # no two (seed, epoch) share it
        positives = _draw(self.positives, self.batches * self.num_pos, generator).view(self.batches, -1)
        negatives = _draw(self.negatives, self.batches * self.num_neg, generator).view(self.batches, -1)
        yield from torch.cat([positives, negatives], 1).flatten().tolist()


def _draw(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows, shuffled as often as needed."""
    rounds = [rows[torch.randperm(len(rows), generator=generator)] for _ in range(-(-count // len(rows)))]
    return torch.cat(rounds)[:count]

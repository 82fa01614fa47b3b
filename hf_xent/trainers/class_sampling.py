"""The rows of a classifier's batches: lists that stay whole, and the rows of all processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from .class_rows import Rows


class Lists(Sampler[int]):
    """Rows in random order, but those with equal entries in a column one after the other, as in the data set.

    Batches hold whole lists where the batch size is a multiple of their length.

    Args:
        dataset: The data set.
        column: The column that says which list a row is of.
        args: The trainer's arguments: seed, and the batch size, which a list must not exceed.

    Raises:
        ValueError: A list is longer than a batch, or the data set cannot be looked at before training.
    """

    def __init__(self, dataset: Any, column: str, args: Any):
        if column not in (getattr(dataset, "column_names", None) or ()):
            raise ValueError(f"train_dataset is a {type(dataset).__name__} whose column {column} is not known: pass a"
                             " datasets.Dataset, or train_sampling_strategy='sequential'")  # fmt: skip
        lists: dict[Any, list[int]] = defaultdict(list)
        for i, name in enumerate(dataset.with_format(None)[column]):
            lists[name].append(i)
        self.lists = [*lists.values()]
        longest = max(map(len, self.lists))
        if longest > args.train_batch_size:
            raise ValueError(
                f"per_device_train_batch_size is {args.train_batch_size}, but a list of column {column} has {longest}"
                " rows: choose at least that"
            )
        self.seed, self.epoch = args.data_seed if args.data_seed is not None else args.seed, 0

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self.lists), generator=torch.Generator().manual_seed(self.seed + self.epoch))
        return (row for i in order.tolist() for row in self.lists[i])

    def __len__(self) -> int:
        return sum(map(len, self.lists))

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer, for another order in every epoch."""
        self.epoch = epoch


_PADDED = {"feature_map", "mask"}


def gathered(rows: Rows, accelerator: Any) -> Rows:
    """The rows of all processes, which may have different numbers of them; gradients reach those of this one."""
    counts = accelerator.gather(torch.tensor([len(rows.labels)], device=rows.labels.device)).tolist()
    join = lambda x: _joined(x, counts, accelerator)  # noqa: E731
    given = {k: join(v) if isinstance(v, Tensor) else v for k, v in rows.given.items() if k not in _PADDED}
    for name in sorted(_PADDED & {*rows.given}):  # sequences, whose lengths are those of each process's batch
        value = rows.given[name].contiguous()  # accelerate makes integers of flags, but on the ranks that pad alone
        value = value.long() if value.dtype == torch.bool else value
        given[name] = join(accelerator.pad_across_processes(value, dim=1)).to(rows.given[name].dtype)
    return Rows(join(rows.logits), join(rows.labels), given)


def _joined(x: Tensor, counts: list[int], accelerator: Any) -> Tensor:
    """All processes' x [N_r, ...] as [sum N_r, ...]; the gradient is scaled by their number, since DDP averages."""
    value = torch.zeros(max(counts), *x.shape[1:], dtype=x.dtype, device=x.device)
    value[: len(x)] = x.detach()
    parts = [part[:n] for part, n in zip(accelerator.gather(value).split(max(counts)), counts, strict=True)]
    if x.requires_grad:
        own = parts[accelerator.process_index]
        parts[accelerator.process_index] = own + len(counts) * (x - x.detach())
    return torch.cat(parts)

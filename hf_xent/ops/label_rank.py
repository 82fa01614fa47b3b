"""The statistic `rank` where the vocabulary is split: the label's logit has to be on all ranks before they count.

The rows are computed once more, for the statistic alone: first the rank with the label tells the others its logit, then
each counts the larger ones among its columns. Both are of the same product, so that equal logits compare as equal.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch import distributed as dist

from .buffers import Buffers
from .problem import Problem
from .row_loss import at_labels
from .statistics import wide
from .tiles import strips


def counts_above(problem: Problem, rows: slice) -> Tensor:
    """How many logits of this rank's columns exceed the label's, in the dtype of statistics [N]."""
    shard = problem.head.shard
    assert shard is not None
    alone = replace(problem, hidden=problem.hidden[rows], labels=problem.labels[rows], payload=None)
    chunks, parts = alone.rows(), []
    buffers = Buffers(alone, chunks)
    for chunk in chunks:
        z, _ = buffers.load(chunk)
        columns = alone.label_columns[chunk]
        target = torch.cat([at_labels(problem.head.activate(strip), columns[span]) for span, strip in strips(z)])
        dist.all_reduce(target, group=shard.group)
        above = [(problem.head.activate(strip) > target[span, None]).sum(-1) for span, strip in strips(z)]
        parts.append(torch.cat(above).to(target.dtype))  # exact: no vocabulary has 2^24 tokens
    return torch.cat(parts) if parts else problem.hidden.new_empty(0, dtype=wide(problem.hidden.dtype))

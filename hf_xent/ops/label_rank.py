"""The statistic `rank` where the vocabulary is split: the label's logit has to be on all ranks before they count.

The rows are computed once more, for the statistic alone: first the rank with the label tells the others its logit, then
each counts the larger ones among its columns. Both are of the same product, so that equal logits compare as equal.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch import distributed as dist

from .matmul import project
from .problem import Problem
from .row_loss import at_labels
from .statistics import wide


def counts_above(problem: Problem, rows: slice) -> Tensor:
    """How many logits of this rank's columns exceed the label's, in the dtype of statistics [N]."""
    head, dtype = problem.head, wide(problem.hidden.dtype)
    assert head.shard is not None
    budget = max(1, problem.memory_budget // 4)  # for a wide copy, and beside the caller's own chunk
    hidden, labels = problem.hidden[rows], problem.label_columns[rows]
    alone = replace(problem, hidden=hidden, labels=labels, payload=None, memory_budget=budget)
    parts = [hidden.new_empty(0, dtype=dtype)]
    for chunk in alone.rows():
        h = hidden[chunk]
        z = head.activate(project(h, head, h.new_empty(len(h), head.size)).to(dtype))
        target = at_labels(z, labels[chunk])
        dist.all_reduce(target, group=head.shard.group)
        parts.append((z > target[:, None]).sum(-1).to(dtype))  # exact: no vocabulary has 2^24 tokens
    return torch.cat(parts)

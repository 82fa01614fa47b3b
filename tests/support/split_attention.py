"""Attention over a sequence that is split over ranks, on any device: keys and values of all ranks are gathered.

What torch's `context_parallel` does with a ring has no kernel on a CPU. Here every query sees the keys before its own
position, wherever they are, so that any order of the parts is right.
"""

import torch
from torch import distributed as dist


class _Gather(torch.autograd.Function):
    """[R, ...] from one tensor of each rank; a rank's gradient is the sum of what all ranks have for it."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, upstream):
        upstream = upstream.contiguous()
        dist.all_reduce(upstream)
        return upstream[dist.get_rank()]


def gathered_attention(module, query, key, value, mask, scaling=None, position_ids=None, **_):
    """In place of transformers' functions of attention; [B, heads, T, size] -> [B, T, heads, size]."""
    everywhere = [torch.empty_like(position_ids) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, position_ids.contiguous())
    after = torch.cat(everywhere, 1)[:, None, None, :] > position_ids[:, None, :, None]
    repeats = query.shape[1] // key.shape[1]
    key, value = (torch.cat([*_Gather.apply(x)], 2).repeat_interleave(repeats, 1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(after, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

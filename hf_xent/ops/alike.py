"""Two heads of one problem cut alike, and a head gathered from its ranks.

A teacher, or a matrix of embeddings, may be on every rank in full while the model's head is split, or the other way
around: the one that is whole is cut to this rank's rows, in a view. Its gradient is summed over the ranks.
"""

from __future__ import annotations

from dataclasses import replace

from .head import Head, Payload
from .shard import Shard, copy_to_ranks, gather_rows


def split_alike(head: Head, payload: Payload | None) -> tuple[Head, Payload | None]:
    """The two heads, of which one that is whole is cut as the other one.

    Raises:
        ValueError: They have other vocabularies, or are cut in other ways.
    """
    if payload is None or head.shard is payload[1].shard:
        return head, payload
    hidden, second = payload
    if second.vocabulary != head.vocabulary:
        raise ValueError(
            f"payload's head has {second.vocabulary} tokens but the head {head.vocabulary}: both need the same"
            " vocabulary"
        )
    if second.shard is None and head.shard is not None:
        return head, (hidden, part_of(second, head.shard, head.size))
    if head.shard is None and second.shard is not None:
        return part_of(head, second.shard, second.size), payload
    assert head.shard is not None and second.shard is not None
    ours, theirs = (
        (s.start, s.start + h.size, s.group.size()) for s, h in ((head.shard, head), (second.shard, second))
    )
    if ours != theirs:
        raise ValueError(
            f"the payload's head has tokens {theirs[0]} to {theirs[1]} on this one of {theirs[2]} ranks but the head"
            f" {ours[0]} to {ours[1]} of {ours[2]}: split both over the same ranks"
        )
    return head, payload


def part_of(head: Head, shard: Shard, size: int) -> Head:
    """This rank's `size` tokens of a head that every rank has in full."""
    rows = slice(shard.start, shard.start + size)
    return replace(head._map(lambda x: copy_to_ranks(x, shard)[rows]), shard=shard)


def whole_of(head: Head) -> Head:
    """The head over the whole vocabulary, gathered from all ranks if it is split; gradients are this rank's rows."""
    shard = head.shard
    return head if shard is None else replace(head._map(lambda x: gather_rows(x, shard)), shard=None)

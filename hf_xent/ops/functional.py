"""The public functions of `hf_xent.ops`: `vocab_stats` (statistics), `vocab_loss` (sums), `map_logits` (full rows)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import reference
from .dispatch import TokenLoss, stream_loss, stream_stats
from .head import Head, Payload
from .higher import under_function_transform
from .request import Request
from .rows import autocast_for, autocast_head, check_head, check_ids, ignored_id, refuse_capture, token_ids
from .statistics import STATISTICS, Stats, wide


def vocab_stats(
    hidden: Tensor,  # [..., D]
    head: Head,
    labels: Tensor,  # [...]
    *,
    outputs: tuple[str, ...] = ("lse", "target", "entropy", "top"),
    payload: Payload | None = None,  # ([..., D2], head of the same V)
    ignore_index: int = -100,
    impl: str | None = None,
    memory_budget: int | None = None,
) -> Stats:
    """Statistics of every token's softmax, differentiable; no [tokens, vocabulary] tensor is kept.

    Gradients reach hidden, the head and the payload (mode *recompute*: four matmuls in all, any graph may follow).
    With `create_graph=True` gradients can be differentiated again, any number of times: they are computed from dense
    rows, a chunk at a time, which costs more. Under torch.func and forward mode all logits are computed at once.

    Args:
        hidden: The hidden states that the head is applied to, [..., D].
        head: The head: weight [V, D], with its bias, scale, softcap, adapter and shard, if it has them.
        labels: Token ids of any integer dtype, [...].
        outputs: Names of statistics, out of `hf_xent.ops.STATISTICS`.
        payload: (hidden2 [..., D2], head2 of the same V): the statistic 'payload' is then the expectation of the second
            head's logits under the first head's softmax.
        ignore_index: The label of positions to ignore.
        impl: 'reference', 'chunked' or 'triton' (default: the environment's HF_XENT_IMPL, else 'chunked').
        memory_budget: Bytes of logits in memory at a time (default: half a byte per number of the head, >= 24 MiB
            and >= 256 float32 rows; on a GPU 395 MB, or a thirty-second of all logits if that is more).

    Returns:
        Statistics shaped like labels, nats; ignored positions hold 0.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, labels are outside the vocabulary, or a statistic is unknown.

    Source: the softmax is streamed as in Wijmans et al. 2024, Cut Your Losses, arXiv:2411.09009; the statistics and
    their common backward are this project's.
    """
    request = Request(ignore_index=ignore_index, impl=impl, memory_budget=memory_budget)
    return stream_stats(hidden, head, labels, outputs, request, payload)


def dense_stats(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    outputs: tuple[str, ...] = ("lse", "target", "entropy", "top"),
    ignore_index: int = -100,
) -> Stats:
    """The statistics that `vocab_stats` returns, of logits that already exist, by plain torch operations.

    Args:
        logits: [..., V].
        labels: Ids of any integer dtype in [0, V), [...].
        outputs: Names of statistics, out of `hf_xent.ops.STATISTICS` without 'payload'.
        ignore_index: The label of positions to ignore.

    Returns:
        Statistics shaped like labels, nats, in float32 or float64; ignored positions hold 0.

    Raises:
        ValueError: Shapes or devices do not fit, labels are outside the vocabulary, or a statistic is unknown.
    """
    labels, ignored = token_ids(labels), ignored_id(ignore_index)
    if logits.ndim == 0 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)} but logits {tuple(logits.shape)}: pass one label per row of logits"
        )
    if unknown := [name for name in outputs if name not in STATISTICS or name == "payload"]:
        choices = ", ".join(name for name in STATISTICS if name != "payload")
        raise ValueError(f"outputs has {unknown[0]!r}: choose among {choices}")
    if labels.device != logits.device:
        raise ValueError(f"labels is on {labels.device} but logits on {logits.device}: move one of them")
    refuse_capture(labels.device)
    mask = labels != ignored
    z, ids = logits[mask], labels[mask]
    check_ids(ids, z.shape[-1], ignored)
    cheap = set(outputs) <= {"lse", "target", "mean"}
    rows = (reference.without_softmax if cheap else reference.statistics)(z.to(wide(z.dtype)), ids)
    values = {name: rows[name].new_zeros(mask.shape).masked_scatter(mask, rows[name]) for name in outputs}
    return Stats(values, labels, mask)


def vocab_loss(
    loss: TokenLoss,
    hidden: Tensor,  # [..., D]
    head: Head,
    labels: Tensor,  # [...]
    *,
    token_weight: Tensor | float = 1.0,  # [...] or one number; constant, no gradient
    observe: tuple[str, ...] = (),
    payload: Payload | None = None,
    unreduced: bool = False,
    ignore_index: int = -100,
    impl: str | None = None,
    memory_budget: int | None = None,
    tail: float = 0.0,
) -> tuple[Tensor, Stats]:
    """The sum `token_weight * loss.of(stats)` over all valid tokens, and detached statistics.

    Mode *eager*: gradients are computed while a chunk of logits is in memory, three matmuls in all.

    Args:
        loss: A loss whose `of(stats)` turns the statistics named in `loss.uses` into per-token losses.
        hidden: As in `vocab_stats`.
        head: As in `vocab_stats`.
        labels: As in `vocab_stats`.
        token_weight: Weights [...] or one number; constant, without gradient.
        observe: Names of further statistics to return.
        payload: As in `vocab_stats`.
        unreduced: Whether to return the weighted losses in the shape of labels, 0 at ignored positions (mode
            *recompute*: their upstream gradients are not known yet).
        ignore_index: As in `vocab_stats`.
        impl: As in `vocab_stats`.
        memory_budget: As in `vocab_stats`.
        tail: The relative error allowed in the gradient of the logits, 1e-3 for instance. Above 0 the gradient of
            unlikely tokens is compressed (`hf_xent.ops.tail`), and the loss itself stays exact: 1 + 3k matmuls, k being
            the share of the vocabulary that is kept. The gradient is exact with `unreduced`, with impl='reference', and
            in a backward with `create_graph=True`.

    Returns:
        The sum, nats, and the detached statistics, which also hold each token's unweighted `loss`.

    Raises:
        ValueError: As in `vocab_stats`; or `tail` is above 0 and the loss uses more than log p, or the head has a
            softcap.
    """
    request = Request(observe, ignore_index, impl, memory_budget, tail, unreduced)
    return stream_loss(loss, hidden, head, labels, request, token_weight, payload)


def map_logits(
    fn: Callable[..., Tensor],
    hidden: Tensor,  # [N, D]
    head: Head,
    *rows: Tensor,  # [N, ...] each, handed to fn chunk by chunk
    memory_budget: int | None = None,
) -> Tensor:
    """`fn(logits, *rows)` over full rows of logits, chunk by chunk, recomputed in the backward; results concatenated.

    It is for functions that are not moments of the softmax (Jensen-Shannon, total variation, top-k).

    Args:
        fn: A function that keeps the first dimension; it may close over differentiable tensors.
        hidden: The hidden states, [N, D].
        head: The head that turns them into logits.
        *rows: Tensors [N, ...] whose rows `fn` gets beside the same rows of logits.
        memory_budget: Bytes of logits in memory at a time, as in `vocab_stats`.

    Returns:
        The concatenated results of `fn`, of all N rows.

    Raises:
        ValueError: Hidden states and head do not fit, or `memory_budget` is not a positive number.
    """
    check_head(hidden, head)
    hidden, head = autocast_for(head, hidden), autocast_head(head, hidden)
    budget = Request(memory_budget=memory_budget).budget(head, len(hidden), hidden.element_size())
    return map_rows(fn, hidden, head, rows, rows_in(budget, head.vocabulary, hidden.dtype))


def rows_in(budget: int, size: int, dtype: torch.dtype) -> int:
    """How many rows of `size` logits fit the memory budget, with what a function of them needs."""
    return max(1, budget // (size * wide(dtype).itemsize * 4))


def map_rows(fn: Callable[..., Tensor], hidden: Tensor, head: Head, rows: Sequence[Tensor], step: int) -> Tensor:
    """`map_logits` of operands that are checked, `step` rows at a time: ranks of a split head need the same steps."""
    run = recomputed(lambda h, *r: fn(head.logits(h), *r))
    parts = []
    for i in range(0, max(1, len(hidden)), step):
        part = [x[i : i + step] for x in (hidden, *rows)]
        parts.append(run(*part))
    return torch.cat(parts)


def recomputed(function: Callable[..., Tensor], *tensors: Tensor | None) -> Callable[..., Tensor]:
    """The function, computed again in the backward in place of keeping what it needs there.

    torch.func has no saved-tensor hooks, which checkpoints need: where it is at work, also by `tensors`, all is kept.
    """
    if under_function_transform(*tensors):
        return function
    return lambda *part: checkpoint(function, *part, use_reentrant=False)

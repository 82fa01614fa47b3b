"""What an evaluation measures beside the loss, from statistics of tokens: no logits are kept or computed.

    top_k_accuracy      share of labels whose logit fewer than k logits exceed; named after k, `top5_accuracy`
    calibration_error   expected calibration error of the tokens' confidence max_j p_j, `hf_xent.metrics.calibration`
    bits_per_byte       sum_t -log2 p(label_t) / number of bytes

Bytes are those of the text, in UTF-8, that each row's labels decode to in one piece, without special tokens: these have
a probability, but no bytes. A causal LM does not predict the first token of a row, so its bytes do not count either.
All are over the labels of an evaluation that count (not -100, of no weight 0), on all processes.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..lazy import LazyLogits
from ..metrics.calibration import BINS, binned, calibration_error
from ..ops import Head, Stats, dense_stats

IGNORED = -100  # also what transformers pads predictions with


class StreamedMetrics(NamedTuple):
    """The predictions that `compute_metrics` gets in place of logits, [N, T] each, in the shape of `label_ids`.

    Position t holds what the model says of label t, whichever position predicts it. It is -100 where there is no label
    and where no position predicts it (the first one of a causal LM), so `metrics.top != -100` are the tokens.
    """

    top: Any
    """The token of the largest logit."""
    logp: Any
    """The log-probability of the label, nats."""
    entropy: Any = None
    """The entropy of the softmax, nats, if it was asked for."""


class Evaluation:
    """The sums of one evaluation, by the options of its trainer's configuration."""

    def __init__(self, args: Any, tokenizer: Any):
        self.args, self.tokenizer = args, tokenizer
        self.sums = torch.zeros(4 + 3 * BINS, dtype=torch.float64)  # tokens, nats, in the top k, bytes; bins

    @property
    def outputs(self) -> tuple[str, ...]:
        """The statistics that the options need."""
        entropy = ("entropy",) if self.args.streamed_entropy else ()
        return ("lse", "target", "top", *entropy, *(("rank",) if self.args.eval_top_k else ()))

    def add(self, logits: Any, labels: Tensor, *, shift: bool) -> dict[str, Tensor]:
        """Add a batch.

        Args:
            logits: [B, T, V], lazy or dense; more positions on the left are those of virtual tokens.
            labels: The model's own, [B, T]; -100 does not count.
            shift: Whether position t predicts label t + 1.

        Returns:
            The fields of `StreamedMetrics` by name, [B, T] each.
        """
        logits = logits[:, -labels.shape[1] :] if logits.shape[1] > labels.shape[1] else logits
        if shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        labels = labels.to(logits.device)
        stats = _stats(logits, labels, self.outputs)
        self._sum(logits, stats)
        found = {"top": stats.top, "logp": stats.logp}
        if self.args.streamed_entropy:
            found["entropy"] = stats.entropy
        first = (1, 0) if shift else (0, 0)
        return {
            name: torch.nn.functional.pad(torch.where(stats.mask, x, IGNORED), first, value=IGNORED)
            for name, x in found.items()
        }

    def metrics(self, accelerator: Any) -> dict[str, float]:
        """The measures, over all processes; none without a token."""
        sums = self.sums.to(accelerator.device, torch.float32 if accelerator.device.type == "mps" else torch.float64)
        tokens, nats, hits, size, *bins = accelerator.reduce(sums, reduction="sum").tolist()
        found: dict[str, float] = {}
        if tokens and self.args.eval_top_k:
            found[f"top{self.args.eval_top_k}_accuracy"] = hits / tokens
        if tokens and self.args.eval_calibration:
            found["calibration_error"] = calibration_error(torch.tensor(bins, dtype=torch.float64).reshape(3, BINS))
        if size:
            found["bits_per_byte"] = nats / math.log(2) / size
        return found

    def _sum(self, logits: Any, stats: Stats) -> None:
        new = torch.zeros_like(self.sums)
        new[0], new[1] = stats.mask.sum(), stats.nll.double().sum()
        if self.args.eval_top_k:
            new[2] = ((stats.rank < self.args.eval_top_k) & stats.mask).sum()
        if self.args.eval_bits_per_byte:
            new[3] = sum(map(self._bytes, stats.labels, stats.mask))
        if self.args.eval_calibration:
            confidence = (_top_logits(logits, stats) - stats.lse[stats.mask]).exp().clamp(max=1)
            new[4:] = binned(confidence.cpu(), stats.is_top1[stats.mask].cpu()).flatten()
        self.sums += new

    def _bytes(self, labels: Tensor, mask: Tensor) -> int:
        text = self.tokenizer.decode(
            labels[mask].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return len(text.encode())


def _stats(logits: Any, labels: Tensor, outputs: tuple[str, ...]) -> Stats:
    if isinstance(logits, LazyLogits) and not logits.is_dense:
        return logits.stats(labels, outputs=outputs)
    return dense_stats(logits, labels, outputs=outputs)


def _top_logits(logits: Any, stats: Stats) -> Tensor:
    """The largest logit of each of the n valid tokens."""
    top = stats.top[stats.mask]
    if not isinstance(logits, LazyLogits) or logits.is_dense:
        return logits[stats.mask].gather(-1, top[:, None]).squeeze(-1).to(stats.lse.dtype)

    def compute(hidden: Tensor, head: Head) -> Tensor:
        return head.logit_of(hidden[stats.mask.to(hidden.device)], top.to(hidden.device))

    return logits.with_head(compute).to(stats.lse)

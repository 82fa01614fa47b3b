"""The scores of answer choices in several prompt formats: the mean log-probability of the tokens of every answer.

    l_kc = (1 / |y_kc|) sum_t log p(y_kc,t | prompt_k, y_kc,<t)          format k, choice c

softmax over c makes them probabilities of the choices. Formats are views of one item, so a calibrator can read from
them how sure an answer is:

    rows = formats.build(dataset, tokenizer)
    scores, views = as_views(choice_scores(model, rows))     # [N, C] of the first format, [K - 1, N, C] of the others
    calibrator = calibration.fit(scores, rows["gold"], views)

Source: Hejabi et al. 2025, arXiv:2510.14242, for the mean over tokens; `hf_xent.trainers.F2CTrainer` trains on them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..data import PromptFormats
from ..lazy import LazyLogits, next_token_labels
from ..models.anatomy import positions
from ..models.contexts import eval_mode
from ..ops import dense_stats
from ..options.ranges import check_count
from ..patching import patched
from ..system.progress import tracked

OUTPUTS = ("lse", "target")


def choice_scores(model: Any, rows: Sequence[Mapping[str, Any]], *, batch_size: int = 8, pad: int = 0) -> Tensor:
    """The scores of all answers of all items in all formats, without logits of the vocabulary.

    The model is patched for the occasion (`hf_xent.patch`), without gradients and in evaluation mode. A score does not
    depend on the rest of its batch.

    Args:
        model: A causal LM.
        rows: N rows that `PromptFormats.build` has made, with K formats and C answers each.
        batch_size: Items in a forward pass, which has K times C sequences of each.
        pad: The id with which shorter sequences are padded.

    Returns:
        Mean log-probabilities [N, K, C] in nats, float32, on the CPU.

    Raises:
        ValueError: No rows, a sequence that is longer than the model has positions, or batch_size below 1.
    """
    check_count("batch_size", batch_size, 1)
    if not len(rows):
        raise ValueError("rows is empty: pass at least one row of PromptFormats.build")
    items, found, room = [dict(row) for row in rows], [], positions(model)
    bar = tracked(
        range(0, len(items), batch_size),
        "scoring",
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with torch.no_grad(), eval_mode(model), patched(model, always=True), bar as starts:
        for start in starts:
            batch = PromptFormats.collate(items[start : start + batch_size], pad)
            length = batch["input_ids"].shape[-1]
            if room is not None and length > room:
                raise ValueError(
                    f"rows has a prompt and answer of {length} tokens, but the model has {room} positions: shorten it"
                )
            ids, mask = (batch[name].flatten(0, 2).to(model.device) for name in ("input_ids", "attention_mask"))
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            found.append(answer_means(logits, batch["answers"]).float().cpu())
    return torch.cat(found)


def answer_means(logits: Tensor, answers: Tensor) -> Tensor:
    """Mean log-probabilities of the answers' tokens [B, K, C].

    Args:
        logits: The logits [B * K * C, L, V] of a model, lazy or not.
        answers: The tokens of the answers [B, K, C, L], -100 outside of them, as `PromptFormats.collate` has them.
    """
    labels = next_token_labels(answers.flatten(0, 2))
    if isinstance(logits, LazyLogits):
        stats = logits.stats(labels, outputs=OUTPUTS)
    else:  # the model computes with its logits itself
        stats = dense_stats(logits, labels.to(logits.device), outputs=OUTPUTS)
    return (stats.logp.sum(-1) / stats.mask.sum(-1)).reshape(answers.shape[:3])


def as_views(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The first format's scores [N, C], and those of the others as views [K - 1, N, C], of scores [N, K, C]."""
    return scores[:, 0], scores[:, 1:].transpose(0, 1)

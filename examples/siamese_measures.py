"""What siamese_ctc.py measures of its arms on test rows: what they write, and where the states of both sides lie."""

from __future__ import annotations

from typing import Any

import torch
from spoken_prompts import PAD, written
from torch import Tensor
from torch.nn import functional as F

from hf_xent.metrics.edits import error_rate
from hf_xent.ops import sinkhorn_divergence, with_positions
from hf_xent.trainers.siamese_collator import TEXT, TEXT_MASK, SiameseCollator


@torch.no_grad()
def greedy(model: Any, batch: dict[str, Tensor]) -> list[str]:
    """What a model writes: the likeliest label of each frame, or the likeliest next letter."""
    speech = {name: batch[name] for name in ("input_features", "attention_mask")}
    if hasattr(model, "decoder"):
        found = model.generate(**speech, max_new_tokens=60, num_beams=1, do_sample=False)
        return [written(ids[1:]) for ids in found]
    labels = model(**speech).logits.argmax(-1).masked_fill(batch["attention_mask"] == 0, PAD)
    return [written(row.unique_consecutive()) for row in labels]


@torch.no_grad()
def states(speech: Any, text: Any, rows: list[Any]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The states of both encoders, [N, S, D] and [N, T, D], each with its mask."""
    batch = SiameseCollator()(rows)
    found = speech(input_features=batch["input_features"], attention_mask=batch["attention_mask"])
    other = text(input_ids=batch[TEXT], attention_mask=batch[TEXT_MASK])
    return (found.last_hidden_state, batch["attention_mask"]), (other.last_hidden_state, batch[TEXT_MASK])


def divergence(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """The mean over rows, with positions."""
    (x, x_mask), (y, y_mask) = one, other
    return sinkhorn_divergence(with_positions(x, x_mask), with_positions(y, y_mask), x_mask, y_mask).mean().item()


def gap(speech: Any, text: Any, test: list[Any]) -> dict[str, float]:
    """Where the states of both sides lie."""
    (x, x_mask), (y, y_mask) = states(speech, text, test)
    mixed = torch.rand(y_mask.shape, generator=torch.Generator().manual_seed(0)).masked_fill(y_mask == 0, 2).argsort(1)
    means = [(s * m[..., None]).sum(1) / m.sum(1, keepdim=True) for s, m in ((x, x_mask), (y, y_mask))]
    nearest = (F.normalize(means[0], dim=-1) @ F.normalize(means[1], dim=-1).T).argmax(1)
    found = {"S": divergence((x, x_mask), (y, y_mask))}
    found["S, other"] = divergence((x, x_mask), (y.roll(1, 0), y_mask.roll(1, 0)))
    found["S, order"] = divergence((x, x_mask), (y.gather(1, mixed[..., None].expand_as(y)), y_mask))
    right = (nearest == torch.arange(len(test))).float().mean().item()
    return {**found, "ratio": found["S"] / found["S, other"], "R@1": right}


def constant(train: list[Any], answers: list[str]) -> float:
    """The error rate of the training transcript that is best for all rows of the training."""
    texts = [written(row["labels"]) for row in train]
    best = min(texts[:100], key=lambda text: error_rate(texts, [text] * len(texts)))
    return error_rate(answers, [best] * len(answers))

"""What the study of the sparse tail measures in a model: rare tokens, the gradient's error, columns kept, and times."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.studies.filters import loss_of
from hf_xent.ops import Head, chunked
from hf_xent.ops.problem import Problem
from hf_xent.ops.tail import select_columns
from hf_xent.patching import patched

TAIL, EXACT, FILTER = "tail", "exact", "filter"


@torch.no_grad()
def held_out(model: Any, ids: Tensor, counts: Tensor, rows: int = 8) -> dict[str, float]:
    """Losses on held-out blocks [n, T], and what the model says about tokens that were rare in training.

        loss       mean over tokens
        rare_loss  the same over the tenth of the tokens whose types were the rarest in training
        rare_mass  probability of all types seen at most once, relative to their share of the held-out tokens

    Args:
        model: A causal language model with a linear head.
        ids: Token ids.
        counts: How often each type was in the training rows, [V].
        rows: Blocks at a time.
    """
    weight, rare = model.lm_head.weight, counts <= 1
    model.eval()
    losses, mass = [], []
    for part in ids.split(rows):
        hidden = model.base_model(input_ids=part, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        for h, y in zip(hidden.split(256), part[:, 1:].flatten().split(256), strict=True):
            logp = F.linear(h, weight).float().log_softmax(-1)
            losses.append(-logp.gather(1, y[:, None]).squeeze(1))
            mass.append(logp[:, rare].exp().sum(-1))
    model.train()
    labels, loss = ids[:, 1:].flatten(), torch.cat(losses).double()
    order = counts[labels].argsort(stable=True)
    share = rare[labels].double().mean()
    return {
        "loss": float(loss.mean()),
        "rare_loss": float(loss[order[: max(1, len(order) // 10)]].mean()),
        "rare_mass": float(torch.cat(mass).double().mean() / share) if share else float("nan"),
    }


def rare_norm(model: Any, counts: Tensor) -> float:
    """The mean norm of the head's rows of the tenth of the types that training saw least, over that of all rows."""
    norms = model.lm_head.weight.detach().float().norm(dim=-1)
    return float(norms[counts.argsort(stable=True)[: max(1, len(counts) // 10)]].mean() / norms.mean())


def twin_of(model: Any) -> Any:
    """A model that shares the weights of another, without its gradients and its patch."""
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    return twin.train()


def gradient(model: Any, ids: Tensor, rule: str, tail: float, bf16: bool = False) -> list[Tensor]:
    """The gradients of all parameters on blocks [B, T], the head's under a rule: EXACT, TAIL or FILTER."""
    model.zero_grad()
    with torch.autocast(ids.device.type, torch.bfloat16) if bf16 else nullcontext():
        loss = loss_of(model, ids) if rule == FILTER else model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [p.grad.detach().float().clone() for p in model.parameters() if p.grad is not None]


def noise(model: Any, batches: list[Tensor], rule: str, tail: float) -> dict[str, float]:
    """The error of a rule's gradient beside the variance of the gradient between batches, in float32.

        noise  mean |c_i - g_i|^2 / V        V = sum |g_i - mean g|^2 / (n - 1), over n batches
        bias   n |mean (c_i - g_i)|^2 / V    what does not average out: 1 is as large as the noise of the mean of n

    g is the exact gradient of all parameters on a batch, c that of the rule.
    """
    if rule == EXACT:
        return {"noise": 0.0, "bias": 0.0}
    n, square, error = len(batches), 0.0, 0.0
    mean: list[Tensor] = []
    drift: list[Tensor] = []
    for ids in batches:
        with patched(model):
            exact = gradient(model, ids, EXACT, 0.0)
        with patched(model, tail=tail) if rule == TAIL else nullcontext():
            gap = [c - g for c, g in zip(gradient(model, ids, rule, tail), exact, strict=True)]
        square, error = square + _square(exact), error + _square(gap)
        mean = [a + b / n for a, b in zip(mean, exact, strict=True)] if mean else [x / n for x in exact]
        drift = [a + b / n for a, b in zip(drift, gap, strict=True)] if drift else [x / n for x in gap]
    model.zero_grad()
    variance = (square - n * _square(mean)) / (n - 1)
    return {"noise": error / n / variance, "bias": n * _square(drift) / variance}


def _square(tensors: list[Tensor]) -> float:
    return sum(float(x.double().square().sum()) for x in tensors)


@torch.no_grad()
def columns(model: Any, ids: Tensor, tail: float) -> float:
    """The share of the head's columns whose gradients the sparse tail computes for blocks [B, T]; 1 where it gives up.

    It computes the exact gradient where more than half of them would be kept.
    """
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1).float()
    labels, weight = ids[:, 1:].flatten(), model.lm_head.weight.float()
    problem = Problem(hidden, Head(weight), labels, frozenset({"lse", "target"}), tail=tail)
    ones = torch.ones(len(labels))
    found = chunked.survey(
        problem, lambda rows, values: {"lse": ones[rows], "target": -ones[rows]}, [slice(0, len(labels))]
    )
    share = len(select_columns(found, replace(problem, tail=tail))) / len(weight)
    return share if share <= 0.5 else 1.0


def time_ratio(model: Any, batches: list[Tensor], tail: float, optimizer_seconds: float, bf16: bool) -> float:
    """The time of a training step with the sparse tail over that of an exact one: the median of alternating pairs.

    Seconds of CPU, of forward and backward on each batch, with those of the optimizer's step added to both.
    """
    ratios = []
    for i, ids in enumerate(batches):
        seconds = {}
        for value in (0.0, tail) if i % 2 else (tail, 0.0):
            with patched(model, tail=value):
                started = process_time()
                gradient(model, ids, TAIL, value, bf16)
                seconds[value] = process_time() - started + optimizer_seconds
        ratios.append(seconds[tail] / seconds[0.0])
    model.zero_grad()
    return median(ratios[1:] or ratios)


def count(ids: Tensor, vocabulary: int) -> Tensor:
    """How often each type is among token ids."""
    return torch.bincount(ids.flatten(), minlength=vocabulary)


def parameters(model: nn.Module) -> int:
    """How many numbers a model trains."""
    return sum(p.numel() for p in model.parameters())

"""Time and memory of distillation against a teacher's k most probable tokens, beside cross-entropy and dense torch.

Losses and both gradients on real hidden states and a real head, float32, on one thread. In each round everything runs
once; times are processor seconds, which a machine that does other things as well changes least, and medians of ratios
to the cross-entropy of the same round. Memory is the most that torch has allocated at a time, without the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from time import process_time

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_xent.bench.config import BenchConfig
from hf_xent.bench.inputs import activations
from hf_xent.losses import CrossEntropy, get
from hf_xent.losses.targets import TAILS, TopK
from hf_xent.ops import Head
from hf_xent.ops.top_k import top_k_of

BASE, DENSE = "cross-entropy", "forward_kl, uniform, dense torch"
OBJECTIVES = ("forward_kl", "reverse_kl", "jsd", "total_variation")
Run = Callable[[], Tensor]


def runs_of(hidden: Tensor, weight: Tensor, labels: Tensor, k: int) -> dict[str, Run]:
    """What is measured, by name: losses of hidden states [N, D], which train as the weight [V, D] does."""
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    found = top_k_of(hidden.detach() + 0.1 * hidden.detach().std() * noise, Head(weight.detach()), k)

    def against(name: str, tail: str) -> Run:
        return lambda: get(name)(hidden, Head(weight), labels, teacher=TopK(*found, tail))

    def dense() -> Tensor:
        others = (found.rest - math.log(len(weight) - k))[:, None].expand(-1, len(weight))
        teacher = others.scatter(1, found.ids, found.logp)
        return F.kl_div(F.linear(hidden, weight).log_softmax(-1), teacher, log_target=True, reduction="batchmean")

    runs: dict[str, Run] = {BASE: lambda: CrossEntropy()(hidden, Head(weight), labels)}
    runs |= {f"{name}, {tail}": against(name, tail) for name in OBJECTIVES for tail in TAILS if tail != "student"}
    return runs | {"forward_kl, student": against("forward_kl", "student"), DENSE: dense}


def seconds_of(run: Run, leaves: list[Tensor]) -> float:
    """Processor seconds of a loss and its gradients."""
    started = process_time()
    torch.autograd.grad(run(), leaves)
    return process_time() - started


def memory_of(run: Run, leaves: list[Tensor]) -> int:
    """The most bytes that torch has allocated at a time for a loss and its gradients, without the gradients."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.grad(run(), leaves)
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    found = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(found, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak - sum(x.nbytes for x in leaves)


def table(config: BenchConfig, k: int) -> str:
    """A Markdown table."""
    torch.set_num_threads(1)
    tensors = activations(config)
    hidden, weight = (tensors[name].float().requires_grad_() for name in ("hidden", "weight"))
    runs = runs_of(hidden, weight, tensors["labels"], k)
    leaves, lines = [hidden, weight], []
    rounds = [{name: seconds_of(run, leaves) for name, run in runs.items()} for _ in range(config.repeats)]
    for name, run in runs.items():
        ratios = [found[name] / found[BASE] for found in rounds]
        memory, logits = memory_of(run, leaves), len(hidden) * len(weight) * 4
        seconds = min(found[name] for found in rounds)
        lines.append(
            f"| {name} | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {seconds:.2f} |"
            f" {memory / 2**20:.0f} | {memory / logits:.2f} |"
        )
    return "\n".join(
        [
            f"{config.model} on {config.data}: V={len(weight)}, D={weight.shape[1]}, {len(hidden)} tokens, k={k},"
            f" {config.repeats} rounds",
            "",
            "| loss | time / cross-entropy | least seconds | MiB beyond the gradients | of one tensor of logits |",
            "|---|---:|---:|---:|---:|",
            *lines,
        ]
    )

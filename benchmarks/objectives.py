"""Time and memory of training objectives relative to cross-entropy, for a loss and its gradients on real activations.

Two tables: the head alone (loss, gradients of hidden states and of the head's weight), and whole training steps of the
model. In each round every objective runs once, all in one process, so that a loaded machine slows all alike; times are
medians of the ratios to cross-entropy within a round. Memory is the increase during a run: for the head without its
gradients, for training steps with everything that the objective keeps (such as the frozen cost of EMO).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from hf_xent.bench.config import BenchConfig
from hf_xent.bench.inputs import activations
from hf_xent.bench.memory import PeakMemory
from hf_xent.bench.rows import PACKAGES, environment
from hf_xent.data import load_text, pack
from hf_xent.losses import EMO, JSD, CrossEntropy, Loss, TaiLr, TotalVariation
from hf_xent.models.loading import load
from hf_xent.ops import Head
from hf_xent.ops.divergences import stream_divergence
from hf_xent.ops.request import Request
from hf_xent.patching import patched
from hf_xent.trainers.divergence import noisefit

Measure = Callable[[], tuple[float, int]]  # runs an objective once -> seconds, bytes
BASE = "cross-entropy"
OBJECTIVES: dict[str, Loss] = {
    BASE: CrossEntropy(),
    "EMO": EMO(),
    "TaiLr": TaiLr(),
}
DISTILLED: dict[str, Loss] = {
    "Jensen-Shannon": JSD(),
    "total variation": TotalVariation(),
}
NOISEFIT, FROZEN = "NoiseFiT, three passes", "{}, head frozen"
PAGE = """\
# What objectives cost

Made by `python -m benchmarks objectives`; {facts}.

{source}, {tokens} tokens, float32, {threads} thread(s); objectives in turn, {repeats} rounds after one that warms up.
Times are medians of the ratio to cross-entropy within a round, memory is the least of any. NoiseFiT's head sees three
times the tokens, for a clean and two noisy passes, whose logits alone would be {logits:.0f} MiB. In Jensen-Shannon and
total variation the teacher has other hidden states and the same head, and so logits of its own.

## The head: loss and gradients

| objective | time / cross-entropy | MiB beyond the gradients |
|---|---:|---:|
{head}
## A training step of the model

| objective | time / cross-entropy | MiB beyond the weights | memory / cross-entropy |
|---|---:|---:|---:|
{steps}"""


@dataclass
class Cost:
    """The cost of one objective, with one number for each round."""

    ratios: list[float] = field(default_factory=list)  # of its time to that of cross-entropy in the same round
    sizes: list[int] = field(default_factory=list)  # bytes

    @property
    def time(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def memory(self) -> int:
        """The smallest size, since memory that the allocator happens to keep only adds to it."""
        return min(self.sizes)


def page(config: BenchConfig) -> str:
    """A Markdown page for one model on one text."""
    tensors = activations(config)
    hidden, weight, labels = (tensors[name] for name in ("hidden", "weight", "labels"))
    head = run_rounds(head_measures(hidden, weight, labels), config.repeats)
    steps = run_rounds(step_measures(config), config.repeats)
    measured_on = environment("cpu", torch.get_num_threads())
    facts = ", ".join(f"{name} {measured_on[name]}" for name in PACKAGES if measured_on[name])
    base_memory = steps[BASE].memory or float("nan")  # NaN for a model too small to measure
    return PAGE.format(
        facts=f"{measured_on['device']}, {facts}, commit {measured_on['commit']}, {measured_on['date'][:10]}",
        source=f"{config.model} on {config.data}: V={len(weight)}, D={weight.shape[1]}",
        tokens=len(labels),
        threads=measured_on["threads"],
        repeats=config.repeats,
        logits=3 * len(labels) * len(weight) * 4 / 2**20,
        head="".join(f"| {name} | {cost.time:.2f} | {cost.memory / 2**20:.0f} |\n" for name, cost in head.items()),
        steps="".join(
            f"| {name} | {cost.time:.2f} | {cost.memory / 2**20:.0f} | {cost.memory / base_memory:.2f} |\n"
            for name, cost in steps.items()
        ),
    )


def run_rounds(measures: dict[str, Measure], rounds: int) -> dict[str, Cost]:
    """Costs of all objectives in `rounds` rounds, after one warm-up round."""
    costs = {name: Cost() for name in measures}
    for number in range(rounds + 1):
        measured = {name: measure() for name, measure in measures.items()}
        for name, (seconds, size) in measured.items() if number else ():
            costs[name].ratios.append(seconds / measured[BASE][0])
            costs[name].sizes.append(size)
    return costs


def head_measures(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Measure]:
    """A measure of each objective: its loss on hidden [N, D], weight [V, D], labels [N], and both gradients."""

    def run(loss: Callable[[Tensor, Head], Tensor], hidden: Tensor, trains: bool = True) -> tuple[float, int]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains)
        with PeakMemory() as memory:
            started = perf_counter()
            loss(h, Head(w)).backward()
            seconds = perf_counter() - started
        return seconds, max(0, memory.extra - sum(x.grad.nbytes for x in (h, w) if x.grad is not None))

    def three_passes(h: Tensor, head: Head) -> Tensor:  # with the weights of its authors
        return stream_divergence(noisefit(), h.chunk(3), head, labels, Request())[0] / len(labels)

    def measures_of(loss: Callable[[Tensor, Head], Tensor], hidden: Tensor, name: str) -> dict[str, Measure]:
        return {name: lambda: run(loss, hidden), FROZEN.format(name): lambda: run(loss, hidden, trains=False)}

    measures: dict[str, Measure] = {}
    for name, loss in OBJECTIVES.items():
        bound = loss.bind(weight)
        measures |= measures_of(lambda h, head, bound=bound: bound(h, head, labels), hidden, name)  # type: ignore[misc]  # bound now
    noise = 0.01 * hidden.std() * torch.randn(2, *hidden.shape, generator=torch.Generator().manual_seed(0))
    teacher = hidden + noise[0], Head(weight)
    for name, loss in DISTILLED.items():
        measures |= measures_of(lambda h, head, loss=loss: loss(h, head, labels, teacher=teacher), hidden, name)  # type: ignore[misc]  # bound now
    return measures | measures_of(three_passes, torch.cat([hidden, *(hidden + noise)]), NOISEFIT)


def step_measures(config: BenchConfig) -> dict[str, Measure]:
    """A measure of each objective: forward and backward of the patched model on as many tokens of text."""
    model, tokenizer = load(config.model, dtype="float32")
    model.train()
    blocks = pack(load_text(config.data), tokenizer, min(config.tokens, 256))
    ids = torch.tensor(blocks[: max(1, config.tokens // 256)]["input_ids"])

    def run(loss: Loss) -> tuple[float, int]:
        with PeakMemory() as memory, patched(model, loss):  # in this order, since tensors that a patch freezes count
            started = perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            seconds = perf_counter() - started
        model.zero_grad(set_to_none=True)
        return seconds, memory.extra

    return {name: lambda loss=loss: run(loss) for name, loss in OBJECTIVES.items()}  # type: ignore[misc]  # bound now

"""The time of an attack beside a plain loop of forward and backward passes, and what rows that leave early save.

A Vision Transformer is trained on digits of scikit-learn, and images that it takes for what they are, are attacked.
Contestants take turns, and CPU seconds of one thread count. In the first table epsilon is so small that no row flips,
so that all contestants do the same passes; in the second one it is large enough for rows to flip.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from hf_xent.robust import Attack, Attacked, attack, get
from hf_xent.system.machine import cpu_name

FILE = Path("benchmarks/results/attacks.md")
SHAPE: dict[str, Any] = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
PROCESSOR = SimpleNamespace(image_mean=[0.5], image_std=[0.5])
METHODS = ("pgd", "pma", "pma:towards=False", "apgd", "apgd:loss=targeted", "pma_plus")
NOTHING, ROWS, APART, EPOCHS = 1e-6, 128, 297, 16
TARGET = 1.1
"""What an attack may take of the plain loop's time, decided before anything was measured."""


def trained() -> tuple[ViTForImageClassification, Tensor, Tensor]:
    """A classifier of digits, images that it was not trained on and takes for what they are, and their labels."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1  # from 0 to 16 to from -1 to 1
    y = torch.tensor(labels)
    order = torch.randperm(len(x))
    model = ViTForImageClassification(ViTConfig(**SHAPE, **SIZES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for rows in order[APART:].split(64):
            loss = F.cross_entropy(model(pixel_values=x[rows]).logits, y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    x, y = x[order[:APART]], y[order[:APART]]
    with torch.no_grad():
        right = (model.eval()(pixel_values=x).logits.argmax(-1) == y).nonzero().flatten()[:ROWS]
    return model, x[right], y[right]


def plain(model: Any, x: Tensor, labels: Tensor, steps: int) -> None:
    """Forward and backward passes to the inputs, and nothing else."""
    for _ in range(steps):
        point = x.detach().requires_grad_()
        loss = F.cross_entropy(model(pixel_values=point).logits, labels, reduction="sum")
        torch.autograd.grad(loss, point)


def page(rounds: int, steps: int, epsilon: float) -> str:
    """The tables, as Markdown.

    Args:
        rounds: Turns of each contestant.
        steps: Steps of an attack.
        epsilon: Of a pixel from 0 to 1, where rows flip.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model, x, labels = trained()
        found: dict[str, Attacked] = {}

        def arm(name: str, method: Attack, radius: float) -> Callable[[], None]:
            def run() -> None:
                found[name] = attack(model, {"pixel_values": x}, labels, radius, steps, method, processor=PROCESSOR)

            return run

        both = {f"{name} {leave}": get(name, leave=leave) for name in METHODS for leave in (True, False)}
        arms = {"loop": lambda: plain(model, x, labels, steps)}
        same = times(arms | {name: arm(name, method, NOTHING) for name, method in both.items()}, rounds)
        if moved := [name for name in both if found[name].flipped.any()]:
            raise RuntimeError(f"rows have flipped under {moved[0]} at epsilon {NOTHING}: the contest is not fair")
        passes = {name: found[f"{name} True"].passes // len(x) - steps for name in METHODS}
        real = times({name: arm(name, method, epsilon) for name, method in both.items()}, max(1, rounds // 2))
    finally:
        torch.set_num_threads(threads)
    ratios = {name: [_ratio(same, f"{name} {leave}") for leave in (True, False)] for name in METHODS}
    missed = [name for name, (left, _) in ratios.items() if left > TARGET]
    verdict = f"missed by {', '.join(missed)}" if missed else "all of them met it"
    head = f"""# Attacks

`python -m benchmarks attacks` makes this page.

{cpu_name()}, 1 thread, torch {torch.__version__}, CPU seconds. A Vision Transformer of
{sum(p.numel() for p in model.parameters())} parameters for 8 x 8 digits, {len(x)} images that it takes for what they
are in a batch; {steps} steps, maximum norm. Medians of {rounds} turns.

## Beside a plain loop

Epsilon is {NOTHING:g}, at which nothing flips. The loop does {steps} forward and backward passes to the inputs and
nothing else, in {statistics.median(same["loop"]):.2f} s; an attack also looks at the images before it, and at the last
point of each of its runs. The target, decided before, is at most {TARGET} of the loop's time: {verdict}.

| attack | of the loop's time | rows do not leave | more forward passes of a row than the loop's {steps} |
|---|---|---|---|
"""
    rows = [f"| {name} | {left:.3f} | {stayed:.3f} | {passes[name]} |" for name, (left, stayed) in ratios.items()]
    return head + "\n".join(rows) + "\n\n" + _leaving(real, found, epsilon)


def _leaving(real: dict[str, list[float]], found: dict[str, Attacked], epsilon: float) -> str:
    """The table of what is saved by rows that leave."""
    lines = [
        "## Rows that leave",
        "",
        f"Epsilon is {epsilon:g} of a pixel. Both ways find the same rows.",
        "",
        "| attack | robust accuracy | seconds | of the seconds without leaving | of the passes |",
        "|---|---|---|---|---|",
    ]
    for name in METHODS:
        fast, slow = found[f"{name} True"], found[f"{name} False"]
        if not torch.equal(fast.flipped, slow.flipped):
            raise RuntimeError(f"{name} finds other rows if these do not leave")
        seconds, without = (statistics.median(real[f"{name} {leave}"]) for leave in (True, False))
        robust = float((~fast.flipped).float().mean())
        lines.append(
            f"| {name} | {robust:.1%} | {seconds:.2f} | {seconds / without:.2f} | {fast.passes / slow.passes:.2f} |"
        )
    return "\n".join(lines)


def times(arms: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each contestant in each round; each is the first in turn."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.process_time()
            arms[name]()
            found[name].append(time.process_time() - start)
    return found


def _ratio(seconds: dict[str, list[float]], name: str) -> float:
    """The median over rounds of the time beside the loop's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds["loop"], strict=True))

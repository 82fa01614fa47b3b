"""The picture of a fine-tuning run: loss and memory against steps."""

from __future__ import annotations

from pathlib import Path

from ..system.figures import panels, save
from .arms import Outcome

STYLES = {"stock": {"color": "#8a8f98", "lw": 5, "alpha": 0.6}, "hf_xent": {"color": "#d1495b", "lw": 1.6}}


def draw(outcomes: list[Outcome], path: Path, title: str) -> Path:
    """Loss curves over each other (left) and peak memory of each step (right), as PNG."""
    figure, (left, right) = panels(2, 10, 3.8)
    for outcome in outcomes:
        style = STYLES[outcome.arm]
        steps = range(1, len(outcome.losses) + 1)
        left.plot(steps, outcome.losses, label=outcome.arm, **style)
        right.plot(range(1, len(outcome.memory) + 1), [m / 2**20 for m in outcome.memory], label=outcome.arm, **style)
    left.set(xlabel="step", ylabel="loss (nats per token)", title="loss")
    right.set(xlabel="step", ylabel="peak memory of the step (MiB)", title="memory", ylim=(0, None))
    for axis in (left, right):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    return save(figure, path)

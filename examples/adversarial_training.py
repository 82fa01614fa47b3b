"""Adversarial training of all weights of a classifier: cross-entropy of inputs that PGD has moved.

model = adversarially_trained(model, batch, labels, processor, rate=1e-3, epsilon=0.1, steps=10, epochs=3, batch=64)

Source: Madry et al. 2018, arXiv:1706.06083.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import get_cosine_schedule_with_warmup

from hf_xent.robust import ascend
from hf_xent.robust.inputs import ball_of, target_of


def moved(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor, processor: Any, **size: Any) -> Any:
    """The inputs after all steps of ascent on the cross-entropy."""
    target = target_of(model, inputs, labels)
    ball, x = ball_of(target, size["epsilon"], "inf", processor), target.center()

    def loss(step: int, x: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.cross_entropy(target.logits(x, rows), labels[rows], reduction="none"), None

    return ascend(loss, x, ball, [2.5 * size["epsilon"] / size["steps"]] * size["steps"], ball.start(x)).x


def adversarially_trained(
    model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor, processor: Any, *, rate: float, **size: Any
) -> Any:
    """The model, in evaluation mode, after `epochs` over the rows; it has no dropout."""
    epochs, batch = size["epochs"], size["batch"]
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, epochs * -(-len(labels) // batch))
    for order in (torch.randperm(len(labels)) for _ in range(epochs)):
        for rows in order.split(batch):
            part = {name: value[rows] for name, value in inputs.items()}
            x = moved(model, part, labels[rows], processor, **size)
            optimizer.zero_grad()
            F.cross_entropy(model(pixel_values=x).logits, labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()

"""Two Vision Transformers of a seed on 3,000 digits: 'plain' by cross-entropy, and 'hardened' by adversarial training.

The hardened one goes on from the plain one, on images that PGD has moved to where their cross-entropy is large.
Models are written to a folder, from which they are read the next time.

Source: Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv:1706.06083.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny_vit
import torch
from torch.nn import functional as F
from transformers import ViTForImageClassification

from hf_xent.robust import Ball, ascend

RADIUS = 0.1
TRAIN, EPOCHS, HARD_EPOCHS, HARD_STEPS, RATE = 3000, 12, 8, 5, 2e-3
PROCESSOR = SimpleNamespace(image_mean=(0.5,), image_std=(0.5,))
"""What an attack reads of an image processor: pixels are from -1 to 1."""


@cache
def models(seed: int, folder: Path) -> dict[str, Any]:
    """The models of a seed, trained or from disk."""
    paths = {name: folder / f"{name}-{seed}" for name in ("plain", "hardened")}
    if not paths["hardened"].exists():
        rows = tiny_vit.images("mnist", "train", seed)[:TRAIN]
        model = tiny_vit.trained("cross_entropy", rows, 10, seed, learning_rate=RATE, num_train_epochs=EPOCHS)
        model.save_pretrained(paths["plain"])
        harden(model, *tensors(rows)).save_pretrained(paths["hardened"])
    return {name: ViTForImageClassification.from_pretrained(path).eval() for name, path in paths.items()}


def tensors(rows: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and labels."""
    return torch.stack([row["pixel_values"] for row in rows]), torch.tensor([row["labels"] for row in rows])


def harden(model: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
    """Trains a model on changed images; random numbers go on from its training before."""
    ball, sizes = Ball(RADIUS, unit=2.0, low=-1.0, high=1.0), [2.5 * RADIUS / HARD_STEPS] * HARD_STEPS
    optimizer = torch.optim.AdamW(model.parameters(), RATE / 2)
    for part in (part for _ in range(HARD_EPOCHS) for part in torch.randperm(len(x)).split(64)):
        labels = y[part]

        def loss(step: int, at: torch.Tensor, rows: torch.Tensor, labels: torch.Tensor = labels) -> Any:
            return F.cross_entropy(model(at).logits, labels[rows], reduction="none"), None

        changed = ascend(loss, x[part], ball, sizes, ball.start(x[part])).x
        optimizer.zero_grad()
        F.cross_entropy(model(changed).logits, labels).backward()
        optimizer.step()
    return model

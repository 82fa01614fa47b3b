"""Logits of digits by a tiny Vision Transformer that was trained on wrong labels, and of changed copies of the digits.

    found = logits("mnist:20", seed, folder)      {"validation": (scores, labels, views), "test": ..., "rotated": ...}

It trains on 3,000 of MNIST's digits, of whose labels a share is another digit, for 8 epochs under cross-entropy. The
1,000 digits for validation are the next ones, with their right labels; the 1,000 for the test are others. `rotated` are
those of the test, turned by 30 degrees, which no digit before was. Views: turned by 15 and by -15 degrees, blurred, and
with half of the contrast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import digits
import tiny_vit
import torch
from scipy.ndimage import gaussian_filter, rotate

from hf_xent.system.files import replace_atomically

EPOCHS, RATE, SPLITS = 8, 1e-3, ("validation", "test", "rotated")


def turned(pixels: Any, degrees: float) -> Any:
    return rotate(pixels, degrees, axes=(-2, -1), reshape=False, order=1, cval=-1)


VIEWS = (
    lambda x: turned(x, 15),
    lambda x: turned(x, -15),
    lambda x: gaussian_filter(x, (0,) * (x.ndim - 2) + (1, 1)),
    lambda x: x / 2,
)


@torch.no_grad()
def scores(model: Any, pixels: Any) -> torch.Tensor:
    parts = torch.as_tensor(pixels).float().split(250)
    return torch.cat([model(pixel_values=part).logits for part in parts])


def logits(source: str, seed: int, folder: Path) -> dict[str, Any]:
    """Scores [M, K], labels [M] and views [V, M, K] of every split, kept in a file."""
    file = folder / f"logits-{seed}.pt"
    if not file.exists():
        noisy, _, test = digits.rows(source.partition(":")[2] or "20", seed)
        clean = digits.images("train", seed)[digits.TRAIN : digits.TRAIN + digits.VALIDATION]
        options = {"learning_rate": RATE, "num_train_epochs": EPOCHS, "output_dir": str(folder / "run")}
        model = tiny_vit.trained("cross_entropy", noisy, digits.CLASSES, seed, **options)
        found = {}
        for name, rows in zip(SPLITS, (clean, test, test), strict=True):
            pixels = torch.stack([row["pixel_values"] for row in rows]).numpy()
            pixels = turned(pixels, 30) if name == "rotated" else pixels
            labels = torch.tensor([row["labels"] for row in rows])
            found[name] = (scores(model, pixels), labels, torch.stack([scores(model, view(pixels)) for view in VIEWS]))
        replace_atomically(file, lambda draft: torch.save(found, draft))
    loaded: dict[str, Any] = torch.load(file)
    return loaded

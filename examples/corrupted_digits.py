"""Streams of corrupted digits, and a tiny Vision Transformer that was trained on clean ones and adapts to them.

Training: 3,500 of MNIST's 4,000 digits for training, 10 epochs under cross-entropy; the other 500 are for validation.
Streams: every digit of the test under each of ten corruptions, one corruption after the other, in batches of 50.
"sudden" streams have severity 3; "gradual" ones rise from 0.5 to 5 within each corruption, and fall again.
Validation: two rounds of four other corruptions of the 500 digits, sudden. Each corruption has its own draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import tiny_vit
import torch
from torch import Tensor
from transformers import ViTForImageClassification

from hf_xent.data.corruptions import corrupt
from hf_xent.system.files import write_atomically

TEST = (
    "gaussian_noise", "shot_noise", "blur", "pixelate", "contrast", "brightness", "fog", "rotation", "elastic",
    "occlusion",
)  # fmt: skip
VALIDATION = ("impulse_noise", "shift", "stripes", "thickening") * 2
TRAIN, BATCH, SEVERITY, EPOCHS, RATE = 3500, 50, 3.0, 10, 1e-3


def digits(split: str, seed: int) -> list[dict[str, Any]]:
    """Rows of 'train', 'validation' or 'test', in an order of the seed; rows are split by an order that has none."""
    if split == "test":
        return tiny_vit.images("mnist", "test", seed)
    rows = tiny_vit.images("mnist", "train", 0)
    return rows[:TRAIN] if split == "train" else rows[TRAIN:]


def trained(seed: int, output: Path) -> Any:
    """The model of a seed, from its folder if it was trained before."""

    def train(draft: Path) -> None:
        options = {"learning_rate": RATE, "num_train_epochs": EPOCHS, "output_dir": str(output / "run")}
        tiny_vit.trained("cross_entropy", digits("train", seed), 10, seed, **options).save_pretrained(draft)

    folder = output / f"model-{seed}"
    if not folder.is_dir():
        write_atomically(folder, train)
    return ViTForImageClassification.from_pretrained(folder).eval()


def batches(rows: list[Any], kinds: tuple[str, ...], gradual: bool, seed: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The number of the corruption, pixels from -1 to 1 and labels of each batch."""
    pixels = torch.stack([row["pixel_values"] for row in rows]).add(1).div(2).clamp(0, 1)
    labels = torch.tensor([row["labels"] for row in rows])
    places = torch.arange(len(rows)) // BATCH
    ramp = 5 - 4.5 * (2 * places / max(1, int(places[-1])) - 1).abs()
    for number, kind in enumerate(kinds):
        changed = corrupt(pixels, kind, ramp if gradual else SEVERITY, seed=100 * seed + number) * 2 - 1
        for x, y in zip(changed.split(BATCH), labels.split(BATCH), strict=True):
            yield number, x, y


def measured(predict: Any, model: Any, stream: Iterator[tuple[int, Tensor, Tensor]], kinds: int) -> dict[str, Any]:
    """Errors of each corruption, in %, and the time of a batch as a multiple of that of a plain forward pass."""
    wrong, seen, times, plain = [0] * kinds, [0] * kinds, [], []
    for number, x, y in stream:
        start = perf_counter()
        with torch.no_grad():
            model(pixel_values=x)
        middle = perf_counter()
        logits = predict({"pixel_values": x})
        times.append(perf_counter() - middle)
        plain.append(middle - start)
        wrong[number] += int((logits.argmax(-1) != y).sum())
        seen[number] += len(y)
    errors = [100 * w / n for w, n in zip(wrong, seen, strict=True)]
    return {"errors": errors, "mean": sum(errors) / kinds, "cost": median(times) / median(plain)}

"""The arms of landmarks.py, and how they are trained.

    trainer = trained("landmarks", seed=0, epochs=10, rows=rows, folder=folder)
    rings = predictions(trainer, fixed)                        [n, 40, 2] in pixels; masks [n, 64, 64] of a U-Net

`rows(target, hide)` makes the rows for training (landmark_digits.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from landmark_digits import POINTS, SIZE, Zeros
from landmark_nets import LinearShapes, UNet, landmark_model
from transformers import Trainer, TrainingArguments

KINDS: dict[str, Any] = {
    "U-Net": lambda shapes: UNet(dice=False), "U-Net + Dice": lambda shapes: UNet(dice=True),
    "landmarks": lambda shapes: landmark_model(POINTS, True), "no skips": lambda shapes: landmark_model(POINTS, False),
    "linear shapes": LinearShapes,
}  # fmt: skip
ARMS = {**{kind: (kind, 0.0) for kind in KINDS}, **{f"{k}, occluded": (k, 0.5) for k in ("U-Net", "landmarks")}}
RATE = 6e-3
SHARES = {"masks": 0.4, "rings": 1}  # of the epochs: about as much time for each network


def target(kind: str) -> str:
    """What rows of a kind of network are labelled with."""
    return "masks" if "U-Net" in kind else "rings"


def true(rows: Zeros) -> np.ndarray:
    """The points of rows in pixels."""
    return np.stack([row["labels"].numpy() for row in rows]) * SIZE


def predictions(trainer: Trainer, rows: Zeros) -> np.ndarray:
    """Rings in pixels or masks."""
    found = trainer.predict(rows).predictions
    return found * SIZE if found.shape[-1] == 2 else found.argmax(1) == 1


def trained(arm: str, seed: int, epochs: float, rows: Any, folder: Path) -> Trainer:
    """A trainer whose model was trained on `rows(target, hide)`."""
    kind, hide = ARMS[arm]
    torch.manual_seed(seed)
    shapes = torch.stack([row["labels"] for row in rows("rings")])
    arguments = TrainingArguments(
        str(folder), num_train_epochs=epochs * SHARES[target(kind)], learning_rate=RATE, seed=seed, report_to="none",
        lr_scheduler_type="cosine", warmup_steps=40, per_device_train_batch_size=16, per_device_eval_batch_size=50,
        save_strategy="no", logging_steps=50, remove_unused_columns=False, dataloader_pin_memory=False,
        label_names=["labels"],
    )  # fmt: skip
    trainer = Trainer(KINDS[kind](shapes), arguments, train_dataset=rows(target(kind), hide))
    trainer.train()
    return trainer

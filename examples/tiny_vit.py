"""Small grey images and a ViT of about 0.1 M weights for them, trained under a loss of classes.

rows = images("mnist", "train", seed=0)
model = trained("cross_entropy", rows, classes=10, seed=0, learning_rate=1e-3, num_train_epochs=10)
embedded, labels, right = read(model, images("mnist", "test", seed=0))
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_xent import data
from hf_xent.trainers import ClassConfig, ClassTrainer

SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
SIDE = 28


def images(name: str, split: str, seed: int) -> list[dict[str, Any]]:
    """Rows in an order of the seed; pixels are from -1 to 1, and smaller images in the corner of 28 x 28 pixels."""
    rows = []
    for row in data.load(name, split=split).shuffle(seed):
        picture = np.array(row["image"])
        canvas = np.pad(picture, [(0, SIDE - side) for side in picture.shape])[None]
        rows.append({"pixel_values": torch.tensor(canvas / 127.5 - 1).float(), "labels": row["label"]})
    return rows


def quiet(**options: Any) -> ClassConfig:
    """A configuration that neither saves nor reports."""
    return ClassConfig(
        per_device_train_batch_size=64, lr_scheduler_type="cosine", save_strategy="no", report_to="none",
        logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip


def trained(loss: str, rows: list[Any], classes: int, seed: int, **options: Any) -> Any:
    """A model that was trained under a loss, by its name."""
    torch.manual_seed(seed)
    shape = ViTConfig(image_size=SIDE, patch_size=7, num_channels=1, num_labels=classes, **SHAPE)
    trainer = ClassTrainer(ViTForImageClassification(shape), quiet(seed=seed, **options), loss=loss, train_dataset=rows)
    trainer.train()
    return trainer.model.cpu().eval()


@torch.no_grad()
def read(model: Any, rows: list[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings, which are what the head sees; labels; and which of them are predicted."""
    states = model.vit(torch.stack([row["pixel_values"] for row in rows])).last_hidden_state[:, 0]
    labels = np.array([row["labels"] for row in rows])
    return states.numpy(), labels, model.classifier(states).argmax(-1).numpy() == labels

"""A small SegFormer that has seen the digits 0 to 4 on photographs, for few_shot_masks.py.

    model = backbone(rows, seed, epochs, folder)        rows of the data set 'composites' with these digits

Its classes are the background and five digits; it has the sizes of the one in masks.py, and is kept in the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from masks import SIZES, pixels
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from hf_xent.trainers import ClassConfig, ClassTrainer

SEEN = 5


def classes(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Pixels and their classes: 0 for the background, else 1 more than the digit."""
    read = pixels(batch)
    return {**read, "labels": [mask * (digit + 1) for mask, digit in zip(read["labels"], batch["label"], strict=True)]}


def backbone(rows: Any, seed: int, epochs: float, folder: Path) -> Any:
    """The model of a seed, trained by cross-entropy if the folder does not have it."""
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(seed)
        model = SegformerForSemanticSegmentation(SegformerConfig(**{**SIZES, "num_labels": SEEN + 1}))
        config = ClassConfig(
            str(folder / "run"), num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=6e-3,
            warmup_steps=30, seed=seed, save_strategy="no", report_to="none", remove_unused_columns=False,
            logging_steps=20, dataloader_pin_memory=False,
        )  # fmt: skip
        ClassTrainer(model, config, loss="cross_entropy", train_dataset=rows.with_transform(classes)).train()
        model.save_pretrained(folder)
    return SegformerForSemanticSegmentation.from_pretrained(folder)

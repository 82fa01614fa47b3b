"""A frozen encoder of digits, the ViT of tiny_vit.py with class means as centers; its heads; accuracies under attack.

model = model_of("ce", seed=0, rate=3e-3)       # a ZeroShot; the arm 'frozen' has no head, 'all weights' nothing frozen
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import digits
import tiny_vit
import torch
from adversarial_training import adversarially_trained
from torch.nn import functional as F
from transformers import ImageProcessingMixin, set_seed

from hf_xent.models.embeddings import features, prototypes
from hf_xent.models.zero_shot import ZeroShot
from hf_xent.robust import attack, masking
from hf_xent.trainers import EncoderCalibrationConfig, EncoderCalibrationTrainer

EPSILON, SMALL, STEPS, EPOCHS, BATCH = 0.1, 8 / 255, 10, 3, 64
SCALES = (1, 2, 5, 10, 20, 50)
PROCESSOR = ImageProcessingMixin(image_mean=[0.5], image_std=[0.5])  # pixels are from -1 to 1
UNUSED = "out/unused"
QUIET: dict[str, Any] = {
    "save_strategy": "no", "logging_strategy": "no", "report_to": "none", "disable_tqdm": True,
    "dataloader_pin_memory": False, "output_dir": UNUSED,
}  # fmt: skip


def batch_of(rows: list[Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return {"pixel_values": torch.stack([r["pixel_values"] for r in rows])}, torch.tensor([r["labels"] for r in rows])


@cache
def frozen(seed: int) -> ZeroShot:
    """The trained encoder, the class means of its features, and the scale with the least loss on validation digits."""
    train, validation, _ = digits.rows("0", seed)
    encoder = tiny_vit.trained(
        "cross_entropy", train, digits.CLASSES, seed, learning_rate=1e-3, num_train_epochs=10, output_dir=UNUSED
    )
    with torch.no_grad():
        batch, labels = batch_of(train)
        centers = prototypes(features(encoder, batch), labels)
        batch, labels = batch_of(validation)
        models = [ZeroShot(encoder, centers, scale=scale) for scale in SCALES]
        return min(models, key=lambda model: F.cross_entropy(model(**batch).logits, labels).item())


def model_of(arm: str, seed: int, rate: float) -> ZeroShot:
    """The classifier of an arm."""
    if arm == "frozen":
        return frozen(seed)
    base, train = frozen(seed), digits.rows("0", seed)[0]
    if arm == "all weights":
        size = {"epsilon": EPSILON, "steps": STEPS, "epochs": EPOCHS, "batch": BATCH}
        set_seed(seed)
        return adversarially_trained(copy.deepcopy(base), *batch_of(train), PROCESSOR, rate=rate, **size)
    model = ZeroShot(base.encoder, base.centers, scale=base.scale)
    config = EncoderCalibrationConfig(
        objective=arm, epsilon=EPSILON, steps=STEPS, learning_rate=rate, num_train_epochs=EPOCHS, seed=seed,
        per_device_train_batch_size=BATCH, lr_scheduler_type="cosine", **QUIET,
    )  # fmt: skip
    EncoderCalibrationTrainer(model, config, train_dataset=train, processing_class=PROCESSOR).train()
    return model


def measured(model: ZeroShot, seed: int, rows: list[Any], steps: int) -> tuple[dict[str, float], tuple[str, ...]]:
    """Accuracies of rows under attack, the change of clean features by the head, and signs of gradient masking."""
    batch, labels = batch_of(rows)
    found = masking(model, batch, labels, EPSILON, steps, processor=PROCESSOR, surrogate=frozen(seed))
    with torch.no_grad():
        drift = (model.embed(**batch) - features(model.encoder, batch)).square().sum(-1).mean().item()
    small = attack(model, batch, labels, SMALL, steps, "pma", processor=PROCESSOR)
    values = {"clean": found.clean, "PGD": found.pgd, "PMA": found.pma, "transfer": found.transfer or 0.0}
    values |= {"PMA, 8/255": (~small.flipped).double().mean().item(), "drift": drift, "signs": len(found.signs)}
    return values, found.signs

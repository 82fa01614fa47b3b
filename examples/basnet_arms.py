"""The arms that `basnet.py` compares, how they are trained and measured, and a figure of what a network predicts."""

from pathlib import Path
from typing import Any

import torch
from masks import METRICS, SIZES, THRESHOLDS
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from hf_xent.metrics.masks import boundary_f, iou
from hf_xent.models.basnet import BasnetConfig, BasnetForSemanticSegmentation
from hf_xent.system import figures
from hf_xent.trainers import ClassConfig, ClassTrainer

ARMS: dict[str, Any] = {
    "BCE of the last output": ("hybrid:terms=bce", False, [0.0]),
    "+ deep supervision": ("hybrid:terms=bce", False, None),
    "+ refinement": ("hybrid:terms=bce", True, None),
    "+ SSIM and IoU: BASNet": ("hybrid", True, None),
    "three terms of the last output": ("hybrid", False, [0.0]),
    "SegFormer": ("cross_entropy", None, None),
    "brightness": None,
    "all pixels": None,
}
"""Arm -> its loss, whether it refines, and the weights of side outputs; None for controls without a network."""
STEPS = list(ARMS)[:4]
"""Each adds one thing to the one before."""
SHOWN = 4
WIDTHS: dict[str, Any] = {
    "hidden_sizes": [8, 16, 24, 32, 32, 32], "depths": [1] * 6, "refine_size": 8, "num_channels": 1, "num_labels": 1,
}  # fmt: skip


def fit(arm: str, seed: int, rate: float, rows: Any, **options: Any) -> ClassTrainer:
    """A model that was trained, in its trainer, which predicts probabilities of the digit."""
    loss, refine, weights = ARMS[arm]
    torch.manual_seed(seed)  # for the weights
    if refine is None:
        model = SegformerForSemanticSegmentation(SegformerConfig(**SIZES))
    else:
        model = BasnetForSemanticSegmentation(BasnetConfig(**WIDTHS, refine=refine))
    config = ClassConfig(
        per_device_train_batch_size=8, per_device_eval_batch_size=50, learning_rate=rate, warmup_steps=20, seed=seed,
        save_strategy="no", report_to="none", remove_unused_columns=False, deep_supervision=weights, **options,
    )  # fmt: skip
    trainer = ClassTrainer(model, config, loss=loss, train_dataset=rows, preprocess_logits_for_metrics=probabilities)
    trainer.train()
    return trainer


def probabilities(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Those of the digit [B, H, W]."""
    logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear")
    return logits[:, 0].sigmoid() if logits.shape[1] == 1 else logits.softmax(1)[:, 1]


def measured(valid: Any, known: Any, test: Any, truth: Any) -> dict[str, float]:
    """The metrics on test rows, at the threshold with the best IoU on validation rows."""
    score, h = max((iou(known, valid > h).mean(), h) for h in THRESHOLDS)
    values = [iou(truth, test > h), *(boundary_f(truth, test > h, t) for t in (1, 0)), iou(truth, test > 0.5)]
    return {n: x.mean() for n, x in zip(METRICS, values, strict=True)} | {"validation": score, "threshold": h}


def draw(model: Any, rows: Any, path: Path) -> None:
    """Images, masks, and the probabilities of every output, one row for each image."""
    images, masks = (torch.stack(rows[:SHOWN][name]) for name in ("pixel_values", "labels"))
    with torch.no_grad():
        found = model.cpu().eval()(images)
    names = ["image", "mask", "refined", *(f"d{k + 1}" for k in range(len(found.side_logits) - 1)), "bridge"]
    shown = [images[:, 0], masks, *(z[:, 0].sigmoid() for z in (found.logits, *found.side_logits))]
    figure, axes = figures.panels(len(shown), 1.2 * len(shown), 1.2 * SHOWN + 0.3)
    for axis, name, column in zip(axes, names, shown, strict=True):
        axis.imshow(torch.cat(list(column)).numpy(), cmap="gray", vmin=-1 if name == "image" else 0, vmax=1)
        axis.set_title(name)
        axis.set_axis_off()
    figures.save(figure, path)

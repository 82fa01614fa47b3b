"""A frozen encoder of digits under attack: a head behind it, trained by three objectives on adversarial examples.

    python examples/encoder_calibration.py [--seeds 3] [--output out/encoder_calibration]

The encoder is the ViT of tiny_vit.py, trained on 3,000 of MNIST's digits; the centers are the class means of its
features, and `scale` is the one of six that fits 1,000 validation digits best. Epsilon is 0.1 for pixels from 0 to 1
(norm 'inf'). A head sees the 3,000 digits in 3 epochs, with 10 steps of ascent on each. The ceiling, 'all weights',
goes on from the same encoder with the same attack, rows and epochs, but all weights of the encoder are trained.

Decided before. Accuracies are those of 500 test digits: clean, under PGD and under PMA (100 steps each) through the
head, and of inputs that PGD changed for the frozen encoder without a head ('transfer', for that arm PGD itself); beside
them, under PMA of a radius of 8/255, for which nothing was trained or chosen.
A head helps if the 95 % interval of its difference to the frozen encoder under PMA, seed by seed, is above 0, and keeps
the clean accuracy if it loses less than 2 points in the mean. Where `hf_xent.robust.masking` sees a sign (their number
is in the table), the figure under PGD is not called robustness. The learning rate of an arm is the one of three with
the best accuracy of 200 validation digits under PMA (20 steps), for seed 0. Seeds draw digits, weights and order.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import calibrated_digits as task
import digits
import typer

from hf_xent.experiments.study import Study

HEADS, REST = (1e-3, 3e-3, 1e-2), (3e-4, 1e-3, 3e-3)
RATES = {"frozen": (), "ce": HEADS, "l2": HEADS, "infonce": HEADS, "all weights": REST}
METRICS = ("clean", "PGD", "PMA", "transfer", "PMA, 8/255", "signs", "drift")
TEST, CHOICE = 500, 200
model_of = cache(task.model_of)  # the best model of seed 0 was trained for the choice of the rate


def chosen(study: Study, arm: str) -> float:
    """The learning rate of an arm."""

    def accuracy(rate: float) -> float:
        rows = digits.rows("0", 0)[1][:CHOICE]
        return task.measured(model_of(arm, 0, rate), 0, rows, steps=20)[0]["PMA"]

    return study.tuned(arm, RATES[arm], accuracy) if RATES[arm] else 0.0


def main(seeds: int = 3, output: Path = Path("out/encoder_calibration")) -> dict[str, Any]:
    """Every arm under every seed; returns the metrics by arm and seed."""
    settings = {"epsilon": task.EPSILON, "steps": task.STEPS, "epochs": task.EPOCHS, "rates": RATES}
    study = Study("Encoder calibration", METRICS, "frozen", output, seeds, settings)
    for arm, seed in study.runs(RATES):
        rate = chosen(study, arm)
        model = model_of(arm, seed, rate)
        values, signs = task.measured(model, seed, digits.rows("0", seed)[2][:TEST], steps=100)
        study.record(arm, seed, **values, rate=rate, share=model.share(), scale=model.scale)
        typer.echo("\n".join(f"{arm}, seed {seed}: {sign}" for sign in signs), nl=bool(signs))
    return study.report(f"Made by `examples/encoder_calibration.py` of hf_xent.\n\n{__doc__}")


if __name__ == "__main__":
    typer.run(main)

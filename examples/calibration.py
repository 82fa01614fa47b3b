"""Calibrate a classifier that stays as it is: three objectives, with and without views, on images and on texts.

    python examples/calibration.py mnist:20 [--seeds 5] [--output out/calibration]           unsure_digits.py
    python examples/calibration.py genres:CORPUS@ENCODER                                     unsure_genres.py

Decided before: calibrators are fitted on validation rows with their defaults, once, and nothing is chosen by the test.
'NLL', temperature scaling, is the baseline. A difference counts if its 95 % interval over seeds is beyond 0.
1. Do views help to tell correct rows from wrong ones? AUROC of the arms with views, against the baseline and against
   the controls: 'own' reads the row's own scores instead of views, 'shuffled' the views of another row.
2. Does the objective matter? 'CA, views' against 'NLL, views' and 'Brier, views': AUROC, ECE, Brier score.
3. Does balance miscalibrate without views, as `hf_xent.calibration.objectives` derives? ECE of 'CA'.
ECE (25 bins), KS and Brier score are of the confidence. Accuracy is the same in all arms (asserted). 'rotated':
digits that are turned further than those of the fit.
"""

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
import typer
import unsure_digits
import unsure_genres

from hf_xent import calibration
from hf_xent.experiments.study import Study

TASKS: dict[str, Any] = {"mnist": unsure_digits, "genres": unsure_genres}
FITS: dict[str, dict[str, Any]] = {
    "NLL": {"objective": "ce"},
    "Brier": {"objective": "brier"},
    "CA": {"objective": "ca"},
    "CA, plain": {"objective": "ca", "balanced": False},
}
ARMS = {name + reads: (reads, fit) for reads in ("", ", views", ", own", ", shuffled") for name, fit in FITS.items()}
ARMS["uncalibrated"] = ("", {})
MEASURES = {"ece": "ECE", "ks": "KS", "auroc": "AUROC", "brier": "Brier", "nll": "NLL", "accuracy": "accuracy"}
DRAWN = ("uncalibrated", "NLL", "CA", "CA, views")


def read(kind: str, scores: torch.Tensor, views: torch.Tensor, seed: int) -> torch.Tensor | None:
    """What the temperature is read from."""
    mixed = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    return {"": None, ", views": views, ", own": scores[None], ", shuffled": views[:, mixed]}[kind]


def main(task: str, seeds: int = 5, output: Path = Path("out/calibration")) -> dict[str, Any]:
    """Every arm under every seed; returns the measures by arm and seed."""
    if (kind := task.partition(":")[0]) not in TASKS:
        raise ValueError(f"task is {task!r}: choose one of {', '.join(TASKS)}")
    folder, splits, logits = output / kind, TASKS[kind].SPLITS[1:], cache(TASKS[kind].logits)
    tail = {split: "" if split == "test" else f" {split}" for split in splits}
    shown = [name + tail[split] for split in splits for name in MEASURES.values()]
    settings = {"task": kind if "@" in task else task}  # without folders of this machine
    study = Study(f"Calibration: {kind}", tuple(shown), "NLL", folder, seeds, settings)
    for arm, seed in study.runs(ARMS):
        (reads, options), parts, row = ARMS[arm], logits(task, seed, folder), {}
        z, y, v = parts["validation"]
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # of balance without views: question 3
            fitted = calibration.fit(z, y, read(reads, z, v, seed), **options) if options else None
        for split in splits:
            z, y, v = parts[split]
            p = fitted(z, read(reads, z, v, seed)) if fitted else z.double().softmax(-1)
            assert torch.equal(p.argmax(-1), z.argmax(-1)), "a temperature changes no prediction"
            measured = calibration.report(p, y)
            row |= {name + tail[split]: measured[measure] for measure, name in MEASURES.items()}
            if seed == 0 and arm in DRAWN:
                calibration.draw({arm: p}, y, folder / f"{split}-{arm.replace(', ', '-')}.png")
        study.record(arm, seed, **row)
    text = f"Made by `examples/calibration.py` of hf_xent.\n\n{__doc__}"
    for control in ("NLL, views", "CA, own", "CA, shuffled"):
        text += (
            f"\nAgainst {control}:\n\n{Study(study.name, tuple(shown), control, folder, seeds, settings).markdown()}\n"
        )
    return study.report(text)


if __name__ == "__main__":
    typer.run(main)

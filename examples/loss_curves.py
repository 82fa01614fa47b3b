"""Forecast the loss under a schedule that was not run: a small GPT-2, the annealing law, and three seeds.

    python examples/loss_curves.py [--text pydoc,brown:FOLDER] [--steps 800] [--seeds 3] [--output out/loss_curves]

A GPT-2 of 1.3 million parameters (small_gpt2.py) reads each token once, under a constant learning rate, a cosine and a
warmup-stable-decay (WSD) schedule. The law is fitted to the constant and the cosine run of a seed, and forecasts its
WSD run. Decided before the runs: losses are those of held-out documents, after the warm-up, every 25 steps; the law's
momentum decays by 0.99 a step, ten times faster than the authors' 0.999, since runs are that much shorter, and theirs
is another arm. Metrics, in percent of the loss: the mean error over the WSD run, that at its end, and the largest one.
Controls: a power law in steps of both runs, and the losses of the constant run (the closest in learning rates) and of
the cosine run at the same step. All runs of a seed read the same batches.
"""

from pathlib import Path
from typing import Any

import numpy as np
import small_gpt2
import typer

from hf_xent import laws
from hf_xent.experiments import forecasting, law_figures
from hf_xent.experiments.study import Study

SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "WSD": "warmup_stable_decay"}
LAWS = {"annealing": "annealing:decay=0.99", "annealing, 0.999": "annealing"}
POWER, CONTROLS = "power law in steps", ("constant, same step", "cosine, same step")
METRICS = ("mean %", "end %", "worst %")
SHAPE, RATE, HELD_OUT, EVERY = (160, 3), 2e-3, 96, 25


def curves(rows: dict[str, Any], seed: int, steps: int, output: Path) -> dict[str, laws.Curve]:
    """The three runs of a seed, after the warm-up."""
    found, warmup = {}, steps // 20
    shared = {"max_steps": steps, "eval_steps": EVERY, "learning_rate": RATE, "warmup_steps": warmup}
    for name, schedule in SCHEDULES.items():
        options = {"num_decay_steps": steps // 5} if name == "WSD" else {}
        training = shared | {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": options}
        found[name] = small_gpt2.run(rows, SHAPE, seed, output / "curves" / f"{name}-{seed}.csv", **training).after(
            warmup
        )
    return found


def predicted(arm: str, runs: dict[str, laws.Curve]) -> np.ndarray:
    """The losses of the WSD run as an arm forecasts them, from the two other runs."""
    known = [runs["constant"], runs["cosine"]]
    if arm in CONTROLS:
        return runs[arm.partition(",")[0]].loss
    if arm == POWER:
        x, y = np.concatenate([run.step for run in known]), np.concatenate([run.loss for run in known])
        return laws.fit("power", {"x": x}, y).predict(x=runs["WSD"].step).loss
    return laws.fit(LAWS[arm], known).predict(runs["WSD"]).loss


def main(
    text: str = "pydoc", steps: int = 800, seeds: int = 3, output: Path = Path("out/loss_curves")
) -> dict[str, Any]:
    """All runs of all seeds; returns the errors of the forecasts by arm and seed."""
    sources = [source.partition(":")[0] for source in text.split(",")]
    settings = {"text": sources, "steps": steps, "tokens a step": small_gpt2.ROWS * small_gpt2.CONTEXT, "shape": SHAPE}
    study = Study("Forecasts of a WSD run", METRICS, CONTROLS[0], output, seeds, settings)
    rows = small_gpt2.blocks(text)
    rows["test"] = rows["test"].shuffle(seed=0).select(range(min(HELD_OUT, len(rows["test"]))))
    for arm, seed in study.runs([*CONTROLS, POWER, *LAWS]):
        runs = curves(rows, seed, steps, output)
        errors = 100 * np.abs(predicted(arm, runs) / runs["WSD"].loss - 1)
        study.record(arm, seed, **dict(zip(METRICS, (errors.mean(), errors[-1], errors.max()), strict=True)))
    runs, figure = curves(rows, seeds - 1, steps, output), output / "forecast.png"
    known = [runs["constant"], runs["cosine"]]
    schedule = f"warmup_stable_decay:num_decay_steps={steps // 5}"
    outlook = forecasting.forecast(known, schedule, steps, LAWS["annealing"])
    law_figures.draw_curves(known, outlook.fit, figure, outlook, measured=runs["WSD"])
    return study.report("Made by `examples/loss_curves.py` of hf_xent; forecast.png shows the last seed.")


if __name__ == "__main__":
    typer.run(main)

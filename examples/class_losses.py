"""Losses of classes on four tasks of one kind each: images, tokens, numbers and ordered answers.

    python examples/class_losses.py mnist:40 [--seeds 3] [--output out/class_losses]

mnist:SHARE         digits, of whose training labels SHARE % are wrong: 0, 20 or 40     digits.py
tags:CORPUS@MODEL   verbs in the past tense, 2 % of the Brown corpus' words             past_tense.py
diabetes            a number, and lists that are ranked by it                           progression.py
bfi:ITEM            an answer from 1 to 6, such as N1, by the other 24                  answers.py

Decided before: what each file says of its arms, training, metrics and rows. Every arm has the one of three learning
rates that is best on validation rows under seed 0; a task with a threshold chooses it on validation rows for every arm.
Seeds draw the training rows, the new weights and the order. An arm is better than the baseline if the 95 % interval
of their difference, seed by seed, is beyond 0. Runs that are done are kept, those that were interrupted are done again.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import answers
import digits
import past_tense
import progression
import torch
import typer
from transformers import set_seed

from hf_xent.experiments.study import Study
from hf_xent.trainers import ClassConfig, ClassTrainer

TASKS: dict[str, Any] = {"mnist": digits, "tags": past_tense, "diabetes": progression, "bfi": answers}


@cache  # the best run of seed 0 was done for the choice of the rate
def run(name: str, arm: str, seed: int, rate: float, folder: Path) -> dict[str, float]:
    """Trains an arm; returns its metrics of test rows, the `validation` metric of the others, and its seconds."""
    key, _, source = name.partition(":")
    task, start = TASKS[key], perf_counter()
    train, *held_out = task.rows(source, seed)
    set_seed(seed)
    config = ClassConfig(
        output_dir=str(folder / "run"), learning_rate=rate, seed=seed, save_strategy="no", logging_strategy="no",
        warmup_steps=0.1, dataloader_pin_memory=False, report_to="none", disable_tqdm=True,
        **task.TRAINING, **task.ARMS[arm],
    )  # fmt: skip
    model, collator = task.model(source)
    trainer = ClassTrainer(
        model, config, train_dataset=train, data_collator=collator,
        preprocess_logits_for_metrics=lambda logits, labels: logits,
    )  # fmt: skip
    trainer.train()
    parts = [trainer.predict(part) for part in held_out]
    found = [(torch.tensor(part.predictions), torch.tensor(part.label_ids)) for part in parts]
    return {**task.measured(trainer.objective, *found), "seconds": perf_counter() - start}


def main(task: str, seeds: int = 3, output: Path = Path("out/class_losses")) -> dict[str, Any]:
    """Every arm of a task under every seed; returns the metrics by arm and seed."""
    chosen = TASKS.get(task.partition(":")[0])
    if chosen is None:
        raise ValueError(f"task is {task!r}: choose one of {', '.join(TASKS)}")
    folder = output / "".join(c if c.isalnum() else "-" for c in task)
    settings = {"task": task, "rates": list(chosen.RATES), **chosen.TRAINING}
    study = Study(f"Losses of classes: {task}", chosen.METRICS, next(iter(chosen.ARMS)), folder, seeds, settings)
    for arm, seed in study.runs(chosen.ARMS):
        rate = study.tuned(arm, chosen.RATES, lambda value, arm=arm: run(task, arm, 0, value, folder)["validation"])
        study.record(arm, seed, rate=rate, **run(task, arm, seed, rate, folder))
    return study.report(f"Made by `examples/class_losses.py {task}` of hf_xent.\n\n{chosen.__doc__}")


if __name__ == "__main__":
    typer.run(main)

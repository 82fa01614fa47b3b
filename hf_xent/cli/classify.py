"""`hf-xent classify`: a classifier is trained, evaluated and asked, under any loss of classes."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer import Option

from ..experiments.class_settings import DATA_HELP, MODEL_HELP, Classifying, Report
from .extended import check_push, more_of, pushed, show_all
from .options import DType, Json, Split, options_from
from .output import emit
from .recipes import Config, HelpAll, Push
from .train import check_training, progress_bars, reporter

if TYPE_CHECKING:
    from ..experiments.classifying import Classified

Model = Annotated[str, Option(help=MODEL_HELP, show_default=False)]
Data = Annotated[str, Option(help=DATA_HELP, show_default=False)]
ARM, CONFIGURATION = "classify", "classes:ClassConfig"


@options_from(Classifying, positional=("loss",), without=("more",), model=Model, dataset=Data, split=Split, dtype=DType)
def classify(
    run: Classifying,
    context: typer.Context,
    config: Config = None,
    push: Push = False,
    help_all: HelpAll = False,
    as_json: Json = False,
) -> None:
    """Train a classifier of texts, tokens, images or tables.

    A part of the rows is held out, and measured before and after. Predictions are those of the held-out rows, or of
    --predict. After an interruption, --resume goes on from the newest checkpoint of --save-steps. Names of TRL and
    every field of ClassConfig are options, too.

    Example: hf-xent classify focal:gamma=2 --model my/encoder --dataset rows.csv --epochs 3 --predict new.csv
    """
    if help_all:
        return show_all("classify", CONFIGURATION)
    run = replace(run, more=more_of(context))
    check_push(push, run)
    check_training(run if run.learning_rate is not None else replace(run, learning_rate=1.0))  # None is a default
    run.check_sources()
    from ..experiments.classifying import classified
    from ..experiments.results import write_results

    with progress_bars() as progress:
        move = reporter(progress, {ARM: run.loss or ARM}, None)
        [task] = progress.task_ids
        report = Report(
            step=lambda step: move(ARM, step),
            phase=lambda phase: move(ARM, phase),
            total=lambda steps: progress.update(task, total=steps),
        )
        outcome = classified(run, report)
        progress.update(task, completed=len(outcome.losses), phase="done")
    results = write_results(Path(run.output), run, [outcome])
    summary = {
        "model": run.model,
        "dataset": run.dataset,
        "loss": outcome.loss,
        "task": outcome.task,
        "classes": outcome.names,
        "rows": outcome.rows,
        "steps": len(outcome.losses),
        **_of_training(outcome),
        "before": outcome.before,
        "after": outcome.after,
        "predicted": outcome.predicted,
        "predictions": outcome.predictions,
        "results": str(results),
        **({"repository": pushed(run.output, run.more)} if push else {}),
    }
    saved = f"model in {run.output}, " if run.save and outcome.losses else ""
    line = f"{saved}{outcome.predicted['rows']} predictions in {outcome.predictions}, every number in {results}"
    emit(summary, _table(run, outcome, summary), line, as_json=as_json)


def _of_training(outcome: Classified) -> dict[str, float]:
    """The losses, the time of a step (the median, without the first), and the memory."""
    if not outcome.losses:
        return {}
    return {
        "first_loss": outcome.losses[0],
        "last_loss": outcome.losses[-1],
        "seconds_per_step": statistics.median(outcome.seconds[1:] or outcome.seconds),
        "peak_memory_mib": outcome.memory / 2**20,
    }


def _table(run: Classifying, outcome: Classified, summary: dict[str, Any]) -> Table:
    """The measures of the held-out rows, and of those of --predict if they have labels."""
    columns = {"before": outcome.before, "after": outcome.after} if outcome.losses else {"value": outcome.after}
    if run.predict and len(outcome.predicted) > 1:
        columns[Path(run.predict).name] = outcome.predicted
    table = Table(f"{outcome.rows['held_out']} held-out rows", title=f"{run.model} on {run.dataset}: {outcome.loss}")
    for name in columns:
        table.add_column(name, justify="right")
    for measure in outcome.after:
        cells = (f"{found[measure]:.4g}" if measure in found else "" for found in columns.values())
        table.add_row(measure.replace("_", " "), *cells)
    if outcome.losses:
        table.caption = (
            f"{len(outcome.losses)} steps on {outcome.rows['train']} rows, {summary['seconds_per_step']:.2f} s each;"
            f" training loss {outcome.losses[0]:.3f} > {outcome.losses[-1]:.3f}"
        )
    return table

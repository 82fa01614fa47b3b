"""`hf-xent train`: one run, or a comparison of two runs that take turns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Option

from ..experiments.finetuning import PATCHED, STOCK, Outcome, Run, Tuning, fit
from .app import unpack_packaged
from .options import Column, DType, Json, Model, Split, Text, check_dtype, options_from
from .output import emit, err

if TYPE_CHECKING:
    from rich.progress import Progress


@options_from(Run, positional=("loss",), model=Model, dataset=Text, split=Split, column=Column, dtype=DType)
def train(
    run: Run,
    compare: Annotated[
        bool, Option("--compare", help="Train twice, with the stock loss and with ours, and compare.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a causal LM on text without logits.

    With --compare, two processes take their steps in turn, one of them with the stock loss.

    Example: hf-xent train focal:gamma=2 --dataset my_texts/ --steps 100 --output out/focal
    """
    if compare and (idle := [name for name in ("save_steps", "resume") if getattr(run, name)]):
        raise ValueError(f"{idle[0]} is given with compare, which keeps no checkpoints: leave one of the two out")
    if compare:
        run = replace(run, save_steps=0, resume=False, save=False)
    _check(run)
    unpack_packaged(run.model)
    outcomes = _outcomes(run, compare)

    from ..experiments.curves import draw_training
    from ..experiments.results import summarize, write_results

    output, summary = Path(run.output), summarize(run, outcomes)
    results = write_results(output, run, outcomes)
    plot = draw_training(outcomes, output / "curves.png", f"{run.model} on {run.dataset}, {run.loss}")
    emit(
        {**summary, "results": str(results), "plot": str(plot)},
        _table(run, outcomes, summary),
        f"{f'model in {output}, ' if run.save else ''}curves in {plot}, every number in {results}",
        as_json=as_json,
    )


def _check(run: Run) -> None:
    """Check the options that can be checked before anything is loaded."""
    from .. import losses

    objective = losses.get(run.loss)
    if objective.needs_teacher:
        raise ValueError(
            f"loss is {run.loss!r}: it needs a teacher model, which this command has no option for; choose another"
        )
    objective.check_tail(run.tail)
    check_training(run)


def check_training(run: Tuning) -> None:
    """Check the options that all trainings share. Raises: ValueError."""
    check_dtype(run.dtype)
    if not 0 < run.learning_rate < math.inf:
        raise ValueError(f"learning_rate is {run.learning_rate}: choose a positive number")


def _outcomes(run: Run, compare: bool) -> list[Outcome]:
    """The outcome of the run, or those of both arms, under progress bars."""
    from ..experiments.arms import side_by_side
    from ..models.quiet import quiet_loading

    titles = {STOCK: STOCK, PATCHED: PATCHED} if compare else {PATCHED: run.loss}
    with progress_bars() as progress:
        report = reporter(progress, titles, run.steps)
        if compare:
            with quiet_loading():
                outcomes = side_by_side(run, report)
        else:
            outcomes = [fit(run, PATCHED, before_step=partial(report, PATCHED), on_phase=partial(report, PATCHED))]
        for task in progress.task_ids:
            progress.update(task, completed=run.steps, phase="done")
    return outcomes


def reporter(progress: Progress, titles: dict[str, str], steps: int | None) -> Callable[[str, int | str], None]:
    """A function `report(arm, step or phase)` that moves the bar of an arm; without a terminal it prints lines.

    The number of steps may be set later, as the total of the bar.
    """
    bars = {arm: progress.add_task(title, total=steps, phase="starting") for arm, title in titles.items()}

    def report(arm: str, event: int | str) -> None:
        change = {"completed": event} if isinstance(event, int) else {"phase": event}
        progress.update(bars[arm], **change)
        if err.is_terminal:
            return
        if isinstance(event, str):
            err.print(f"{titles[arm]}: {event}", highlight=False)
            return
        total = int(progress.tasks[bars[arm]].total or 0)
        if event and event % max(1, total // 5) == 0:
            err.print(f"{titles[arm]}: {event} of {total} steps", highlight=False)

    return report


def progress_bars() -> Progress:
    """Bars of steps, on standard error."""
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description:>8}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[phase]}"),
    )
    return rich.Progress(*columns, console=err)


def _table(run: Run, outcomes: list[Outcome], summary: dict[str, Any]) -> Table:
    table = Table(
        title=f"{run.model} on {run.dataset}: {run.loss}, {run.steps} steps of {outcomes[0].tokens_per_step} tokens"
    )
    for name in ("", "loss", "eval loss", "s/step", "tokens/s", "peak MiB"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for arm, row in summary["runs"].items():
        table.add_row(
            arm,
            f"{row['first_loss']:.3f} > {row['last_loss']:.3f}",
            f"{row['eval_before']:.3f} > {row['eval_after']:.3f}",
            f"{row['seconds_per_step']:.2f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['peak_memory_mib']:.0f}",
        )
    if len(outcomes) == 2:
        table.caption = (
            f"largest relative difference of the losses {summary['largest_loss_difference']:.1e}; step time"
            f" {summary['step_time_ratio']:.2f}x (median over pairs of steps);"
            f" {abs(summary['memory_saved_mib']):.0f} MiB ({abs(summary['memory_saved']):.0%})"
            f" {'less' if summary['memory_saved'] >= 0 else 'more'} memory"
        )
    return table

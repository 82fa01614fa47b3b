"""`hf-xent attack`: how many inputs a classifier still gets right when they are changed a little, to fool it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..experiments.attack_settings import Attacking
from .options import DType, Json, Split, check_dtype, options_from
from .output import emit, literal
from .train import progress_bars

if TYPE_CHECKING:
    from rich.table import Table

MOST = 20
"""Accuracies of so many classes are shown; --json and results.json have all."""


@options_from(Attacking, positional=("model",), split=Split, dtype=DType)
def attack(run: Attacking, as_json: Json = False) -> None:
    """Attack a trained classifier of images or texts.

    Measured are its accuracy before, and under the worst small changes that are found. Robust accuracy is the share of
    rows that no change within epsilon was found for: an upper bound, which a stronger attack may lower. Rows that are
    wrong before count as wrong. Intervals are Wilson's, of 95 %. After an interruption, the same command goes on with
    the next batch.

    Example: hf-xent attack out/classify --dataset mnist --split test --method pgd --epsilon 8/255 --masking
    """
    check_dtype(run.dtype)
    run.check()
    from ..experiments.attacking import attacked

    with progress_bars() as progress:
        bars = {method: progress.add_task(literal(method), total=None, phase="waiting") for method in run.methods}

        def report(method: str, done: int, total: int, robust: float) -> None:
            progress.update(bars[method], completed=done, total=total, phase=f"robust {robust:.1%}")

        _, summary = attacked(run, report)
    signs = [f"masking: {literal(sign)}" for sign in (summary["masking"] or {}).get("signs", ())]
    if run.masking and not signs:
        signs = ["masking: no sign of it was seen, which is no proof that there is none"]
    line = f"every row in {summary['written']}, every number in results.json beside it"
    emit(summary, _table(summary), *signs, line, as_json=as_json)


def _table(summary: dict[str, Any]) -> Table:
    """A column for each attack: accuracies with their interval, also by class, passes of a row and seconds."""
    from rich.table import Table

    ball = f"epsilon {summary['epsilon']:.4g}, norm {summary['norm']}"
    table = Table(f"{summary['rows']} rows", title=f"{summary['model']} on {summary['dataset']}: {ball}")
    columns = {"clean": summary["clean"], **summary["attacks"]}
    for name in columns:
        table.add_column(literal(name), justify="right")
    table.add_row("accuracy", *(f"{found['accuracy']:.1%}" for found in columns.values()))
    table.add_row("95 %", *(f"{found['low']:.1%} to {found['high']:.1%}" for found in columns.values()))
    for name, count in [*summary["rows_by_class"].items()][:MOST]:
        cells = (f"{found['by_class'][name]:.1%}" for found in columns.values())
        table.add_row(literal(f"{name} ({count})"), *cells)
    most = f"passes a row ({summary['steps']} steps at most)"
    table.add_row(most, "1", *(f"{found['passes_per_row']:.1f}" for found in summary["attacks"].values()))
    table.add_row("seconds", "", *(f"{found['seconds']:.1f}" for found in summary["attacks"].values()))
    return table

"""A progress bar for `run`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .measure import Report


@contextmanager
def progress(title: str = "") -> Iterator[Report]:
    """Show a progress bar during the block: `with progress("first of two") as report: rows = run(config, report)`."""
    texts = (TextColumn(title, markup=False), TextColumn("{task.description:<40.40}"))
    columns = (*texts, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task("start")
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)

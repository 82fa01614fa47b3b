"""Folders as one page of HTML, which needs no server, runs no script and asks no host for anything.

    write([read("out/train")], Path("out/train/index.html"))

Several folders stand on one page: their curves share charts, and the settings that differ are in one table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..system.files import replace_atomically
from .contents import SECTIONS, Chart, Folder, Table
from .drawing import Drawn, drawn
from .overlay import labels_of, overlaid_charts, overlaid_tables, settings_that_differ

TEMPLATES = Path(__file__).parent / "templates"
MARK = '<meta name="generator" content="hf-xent show">'
"""By this line a page is known as one that may be written again."""


def render(folders: Sequence[Folder]) -> str:
    """The page of one folder, or of several over each other.

    Args:
        folders: What `read` returns, one or more.

    Returns:
        HTML. All text of the folders is escaped.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    labels = labels_of(folders)
    if len(folders) == 1:
        [one] = folders
        tables, charts, title = one.tables, one.charts, labels[0]
    else:
        tables, charts = overlaid_tables(folders, labels), overlaid_charts(folders, labels)
        differ = settings_that_differ(folders, labels)
        tables = [*([differ] if differ else []), *tables]
        title = " · ".join(labels)
    return environment.get_template("page.html").render(
        mark=MARK, title=title, folders=[*zip(labels, folders, strict=True)], sections=[*_sections(tables, charts)]
    )


def _sections(tables: list[Table], charts: list[Chart]) -> Iterable[tuple[str, list[Table], list[Drawn]]]:
    """The headings that have something under them. A curve's color is the same in all charts of a section."""
    for section in SECTIONS:
        own = [chart for chart in charts if chart.section == section]
        names = list(dict.fromkeys(curve.name for chart in own for curve in chart.curves))
        colors = {name: i for i, name in enumerate(names)}
        figures: list[Any] = [drawn(chart, colors) for chart in own]
        found = [figure for figure in figures if figure is not None]
        shown = [table for table in tables if table.section == section]
        if shown or found:
            yield section, shown, found


def write(folders: Sequence[Folder], file: Path) -> Path:
    """Writes the page of folders.

    Args:
        folders: What `read` returns, one or more.
        file: The page; one that was written here before is replaced.

    Returns:
        The file.

    Raises:
        ValueError: There is a file of another kind under this name.
    """
    check_replaceable(file)
    text = render(folders)
    return replace_atomically(file, lambda draft: draft.write_text(text, encoding="utf-8"))


def check_replaceable(file: Path) -> None:
    """Raises: ValueError if there is something under this name that is no page of this command."""
    if file.is_dir():
        raise ValueError(f"output is {file}, which is a folder: name a file, such as {file / 'index.html'}")
    if file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise ValueError(f"output is {file}, which is no page of `hf-xent show`: name another file")

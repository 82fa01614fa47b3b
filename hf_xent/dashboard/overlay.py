"""Several folders over each other: their curves in common charts, their tables under common heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .contents import CURVES, RESULTS, SAMPLES, Chart, Folder, Table


def labels_of(folders: Sequence[Folder]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    paths = [Path(folder.path).resolve().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        labels = ["/".join(path[-length:]) for path in paths]
        if len({*labels}) == len(labels):
            return labels
    raise ValueError(f"folder {folders[0].path} is given twice: name each folder once")


def overlaid_tables(folders: Sequence[Folder], labels: Sequence[str]) -> list[Table]:
    """Joins tables of the same title and head; their rows begin with the folder. Samples stay apart."""
    joined: dict[tuple[str, ...], Table] = {}
    for folder, label in zip(folders, labels, strict=True):
        for table in folder.tables:
            if table.section == SAMPLES:
                joined[label, table.title] = replace(table, title=f"{label}: {table.title}")
                continue
            key = (table.title, *table.head)
            before = joined.get(
                key, replace(table, head=["folder", *table.head], rows=[], note="", names=table.names + 1)
            )
            notes = [before.note, f"{label}: {table.note}" if table.note else ""]
            rows = [*before.rows, *([label, *row] for row in table.rows)]
            joined[key] = replace(before, rows=rows, note=" ".join(filter(None, notes)))
    return [*joined.values()]


def overlaid_charts(folders: Sequence[Folder], labels: Sequence[str]) -> list[Chart]:
    """Joins charts of the same title. Those with named rows stay apart.

    Returns:
        Charts in which a curve's name is its folder's, followed by its own if the folder has curves of several names.
    """
    joined: dict[tuple[str, str], Chart] = {}
    for folder, label in zip(folders, labels, strict=True):
        several = len({c.name for chart in folder.charts if chart.section == CURVES for c in chart.curves}) > 1
        for chart in folder.charts:
            if chart.rows:
                joined[label, chart.title] = replace(chart, title=f"{label}: {chart.title}")
                continue
            key = (chart.section, chart.title)
            alone = chart.section == CURVES and not several
            before = joined[key].curves if key in joined else []
            curves = [
                curve if curve.is_diagonal else replace(curve, name=label if alone else f"{label}: {curve.name}")
                for curve in chart.curves
                if not (before and curve.is_diagonal)
            ]
            joined[key] = replace(chart, curves=[*before, *curves])
    return [*joined.values()]


def settings_that_differ(folders: Sequence[Folder], labels: Sequence[str]) -> Table | None:
    """A table of the settings that are not the same in all folders; None if all are."""
    names = dict.fromkeys(name for folder in folders for name in folder.settings)
    rows = [[name, *(folder.settings.get(name, "") for folder in folders)] for name in names]
    rows = [row for row in rows if len({*row[1:]}) > 1 and row[0] != "output"]
    return Table("Settings that differ", ["", *labels], rows, RESULTS) if rows else None

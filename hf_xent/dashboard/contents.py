"""What a page shows of a folder: charts, tables, settings, samples, a card and pictures."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

RESULTS, CURVES, DETECTION, ATTACKS, SEARCH, SEEDS, SAMPLES = SECTIONS = (
    "Results",
    "Curves",
    "Detection",
    "Attacks",
    "Search",
    "Seeds",
    "Samples",
)
"""The headings of tables and charts, in the order of the page."""


@dataclass(frozen=True)
class Curve:
    """Points (x, y) under a name; curves of one name have one color, and a note tells them apart.

    A point whose y is None or not finite leaves a gap.
    """

    name: str
    x: list[float]
    y: list[float | None]
    note: str = ""
    """Such as 'evaluation'; a curve with a note is dashed."""
    joined: bool = True
    """Whether lines join the points."""
    is_diagonal: bool = False
    """Whether it is the line of chance, which has no marks."""

    @property
    def label(self) -> str:
        """The name and the note."""
        return f"{self.name} ({self.note})" if self.note else self.name


@dataclass(frozen=True)
class Chart:
    """Curves over common axes."""

    title: str
    curves: list[Curve]
    x: str = "step"
    y: str = ""
    section: str = CURVES
    rows: tuple[str, ...] = ()
    """The names of y = 0, 1, ..., from the top, in place of numbers."""
    log_x: bool = False
    unit: bool = False
    """Whether y is a share, drawn from 0 to 1."""


@dataclass(frozen=True)
class Table:
    """Cells under a head; a cell is text."""

    title: str
    head: list[str]
    rows: list[list[str]]
    section: str = RESULTS
    note: str = ""
    names: int = 1
    """How many columns, from the left, are names."""
    texts: bool = False
    """Whether cells are texts, which wrap, and not numbers."""


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI."""

    name: str
    uri: str


@dataclass
class Folder:
    """Everything that was found in a folder."""

    path: Path
    kinds: list[str] = field(default_factory=list)
    """What it is a folder of, such as 'training'."""
    settings: dict[str, str] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    card: str = ""
    """The card as HTML."""
    head: str = ""
    """The card's front matter, YAML."""
    pictures: list[Picture] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    """The files that were read, relative to the folder."""

    def set(self, settings: dict[str, Any]) -> None:
        """Adds settings; those that are None or empty are left out."""
        self.settings |= {name: shown(value) for name, value in settings.items() if value not in (None, {}, [])}

    def summary(self) -> dict[str, Any]:
        """What was found, for JSON."""
        return {
            "folder": str(self.path),
            "kinds": self.kinds,
            "files": self.files,
            "settings": self.settings,
            "tables": {table.title: len(table.rows) for table in self.tables},
            "charts": {
                chart.title: [" ".join((c.name, c.note)).strip() for c in chart.curves] for chart in self.charts
            },
            "card": bool(self.card),
            "pictures": [picture.name for picture in self.pictures],
        }


def shown(value: Any) -> str:
    """A value as the text of a cell: numbers with four significant digits, lists with commas."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value))
    if isinstance(value, dict):
        return ", ".join(f"{name}: {shown(one)}" for name, one in value.items())
    return str(value)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)

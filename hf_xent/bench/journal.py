"""The rows of a run in a file of JSON lines, appended as they are measured: `Journal`. A killed run loses none."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .rows import Row


class Journal:
    """A file of rows; a new run finds those of the same commit there and does not measure them again.

    Args:
        path: The file; None keeps the rows in memory alone. Deleting the file starts over.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        text = path.read_text(encoding="utf-8") if path is not None and path.is_file() else ""
        self.rows: dict[tuple[Any, ...], Row] = {}
        for line in text.splitlines():
            row = _parse(line)
            if row is not None:
                self.rows[_key(row)] = row
        self._broken = bool(text) and not text.endswith("\n")

    def find(self, planned: Row) -> Row | None:
        """The row with the contestant, inputs, device and commit of another one, if it has been measured."""
        return self.rows.get(_key(planned))

    def append(self, row: Row) -> None:
        """Add a row to the file at once."""
        self.rows[_key(row)] = row
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._broken else "") + json.dumps(asdict(row)) + "\n")
        self._broken = False


def _key(row: Row) -> tuple[Any, ...]:
    return (*row.key, row.commit, row.torch)


def _parse(line: str) -> Row | None:
    """The row of a line; None for one that a kill cut off, or with the fields of another version."""
    try:
        values = json.loads(line)
        return Row(**{f.name: values[f.name] for f in fields(Row)})
    except (ValueError, KeyError, TypeError):
        return None

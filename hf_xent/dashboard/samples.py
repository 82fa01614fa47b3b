"""The first rows of files of predictions and generations, as tables of texts."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from .contents import SAMPLES, Folder, Table, shown

STEMS = ("predictions", "generations", "completions", "samples", "rows", "scores")
"""Files whose names begin so are shown, in the folder and in its subfolder `completions`, where TRL logs them."""
SHOWN, COLUMNS, LONGEST = 20, 12, 600
"""The most rows and columns of a table, and the most characters of a cell."""


def read_samples(folder: Folder) -> None:
    """Adds a table for each file of samples; of TRL's completions, only for the newest."""
    files = [file for stem in STEMS for file in sorted(folder.path.glob(f"{stem}*")) if file.suffix in READERS]
    logged = sorted((folder.path / "completions").glob("completions*.parquet"))
    for file in dict.fromkeys([*files, *logged[-1:]]):
        rows = list(islice(READERS[file.suffix](file), SHOWN + 1))
        if not rows:
            continue
        folder.files.append(str(file.relative_to(folder.path)))
        head = list(dict.fromkeys(name for row in rows for name in row))
        more = [f"The first {SHOWN} rows of the file."] if len(rows) > SHOWN else []
        more += [f"{len(head) - COLUMNS} more columns are in the file."] if len(head) > COLUMNS else []
        cells = [[_cell(row.get(name)) for name in head[:COLUMNS]] for row in rows[:SHOWN]]
        folder.tables.append(Table(file.name, head[:COLUMNS], cells, SAMPLES, " ".join(more), texts=True))


def _cell(value: Any) -> str:
    text = shown(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _of_csv(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8", newline="", errors="replace") as opened:
        for row in csv.DictReader(opened):
            yield {name or "": _number(value) for name, value in row.items()}


def _number(text: Any) -> Any:
    """A number with a fraction as such, so that it is rounded; any other text as it is."""
    try:
        return float(text) if "." in text else text
    except (TypeError, ValueError):
        return text


def _of_lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8", errors="replace") as opened:
        for line in opened:
            if line.strip():
                yield _row(json.loads(line))


def _of_json(file: Path) -> Iterator[dict[str, Any]]:
    stored = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(stored, list):
        yield from map(_row, stored)


def _of_text(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8", errors="replace") as opened:
        yield from ({"text": line.rstrip("\n")} for line in opened if line.strip())


def _of_parquet(file: Path) -> Iterator[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile  # lazy: the other files need no library

    with ParquetFile(file) as opened:
        batches: Iterable[Any] = opened.iter_batches(batch_size=SHOWN + 1)
        for batch in batches:
            yield from batch.to_pylist()


def _row(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"text": value}


READERS = {".csv": _of_csv, ".jsonl": _of_lines, ".json": _of_json, ".txt": _of_text, ".parquet": _of_parquet}
"""Suffix -> the rows of such a file."""

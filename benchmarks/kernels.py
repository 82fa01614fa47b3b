"""A page of what every kernel variant takes of every GPU it is compiled for (`offline`): nothing of it is a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.offline import TARGETS, compiled, disassemblers

PAGE = """\
# What the kernels take of a GPU

Made by `python -m benchmarks kernels`; triton {triton}, torch {torch}.

No number on this page is a time, and none was found on a GPU: every kernel variant was compiled for each GPU without
one. A cell has the registers of a thread, its spilled stores (of AMD's compiler, its spilled registers) where there are
any, the shared memory of a program in KiB, and the matrix instructions of the program; `fails` is a variant that this
Triton does not compile for this GPU. Cells are empty where a variant launches a kernel of a line above, or none: the
matmuls with an epilogue need the copy engine of sm_90 and later.

A program may have {limits}.
[The test]({test}) holds this, and the spills on sm_90.
"""
TEST = "https://github.com/hf-xent/hf_xent/blob/main/tests/test_offline.py"


def page() -> str:
    """The Markdown page: a table for each dtype. Raises: RuntimeError without the tools that read compiled kernels."""
    if disassemblers() is None:
        raise RuntimeError("this Triton brings no cuobjdump and nvdisasm: install triton from PyPI, on Linux")
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for target in TARGETS:
        with tempfile.TemporaryDirectory() as cache:
            for record in compiled(target, "all", Path(cache)):
                row = record["variant"], record["kernel"]
                cells.setdefault(row, {})[target] = cell(record)
    limits = ", ".join(f"{target.shared >> 10} KiB on {name}" for name, target in TARGETS.items())
    text = PAGE.format(triton=version("triton"), torch=version("torch"), limits=limits, test=TEST)
    return text + "".join(tables(cells))


def cell(record: dict[str, Any]) -> str:
    """What a kernel takes of one GPU, in a few words."""
    if "error" in record:
        return "fails"
    spills = [f"{record['spills']} spilled"] if record["spills"] else []
    matrix = [f"{count} {name}" for name, count in record["matrix"].items()]
    return ", ".join([f"{record['registers']} regs", *spills, f"{record['shared'] / 1024:.1f} KiB", *matrix])


def tables(cells: dict[tuple[str, str], dict[str, str]]) -> Iterator[str]:
    """A table for each dtype, the first word of a variant."""
    rows = sorted(cells, key=lambda row: row[0].partition(" ")[0])  # stable: in the order of their compilation
    for dtype, group in groupby(rows, key=lambda row: row[0].partition(" ")[0]):
        yield f"\n## {dtype}\n\n| variant | kernel | {' | '.join(TARGETS)} |\n|---|---|{'---|' * len(TARGETS)}\n"
        for variant, kernel in group:
            found = (cells[variant, kernel].get(target, "") for target in TARGETS)
            yield f"| {variant.partition(' ')[2]} | `{kernel}` | {' | '.join(found)} |\n"

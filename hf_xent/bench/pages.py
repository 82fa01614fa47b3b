"""Pages of results: one page for each device and the table of the README, generated from the CSV files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .contestants import CONTESTANTS
from .objectives import OBJECTIVES, PLAIN
from .plots import draw
from .rows import OK, PACKAGES, WRONG, Row, from_csv, stem

OPEN, CLOSE = "<!-- bench -->", "<!-- /bench -->"
README_DTYPES = ("float32", "bfloat16")

PAGE = """\
# {device}

Made by `hf-xent report` from [{csv}]({csv}), to which `hf-xent bench` adds what it measures.

Times are of the mean loss and both gradients: the median iteration (interquartile range), and its ratios to dense torch
and to the three bare matmuls. On a CPU each contestant has a process, and ratios are medians over rounds. On a GPU
contestants share a few processes: dense is measured once for each input, its time is that of all ratios to it, and the
matmuls are measured in the contestant's process, just before and just after it. Objectives beyond cross-entropy have
tables of their own, where dense torch computes them from float32 logits. Peak memory is what an iteration needs beyond
inputs and gradients, also as a share of the [N, V] logits. Errors are relative to torch in the widest affordable dtype,
in the Frobenius norm. A contestant is `wrong`, and gets no time, where its gradients err more than twice as much as
dense's and more than its own tolerance. The note of an `absent` or `failed` contestant gives the reason; the note of
any other gives its fastest setting.

{legend}
"""

README = """\
Mean cross-entropy and both gradients. Of each device, the table has the largest inputs (N times V) from a real model,
in {dtypes}, with every contestant that ran; one that fails the correctness gate is `wrong` and has no time.
Peak memory is what an iteration needs beyond inputs and gradients, also as a share of the [N, V] logits; errors are
relative to torch in the widest affordable dtype.
"""


def write_page(path: Path) -> list[Path]:
    """Write the page and the plots of a device's CSV file beside it; returns their paths."""
    rows = _ordered(from_csv(path))
    plots = draw(rows, path.with_suffix(""))
    parts = [
        PAGE.format(device=rows[0].device, csv=path.name, legend=_legend(rows)),
        *(f"![{plot.stem}]({plot.name})\n" for plot in plots),
        markdown(rows),
    ]
    page = path.with_suffix(".md")
    page.write_text("\n".join(parts), encoding="utf-8")
    return [page, *plots]


def markdown(rows: Iterable[Row]) -> str:
    """The rows as Markdown, one table for each input and environment."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(_ordered(rows), key=_place):
        groups.setdefault(_title(row), []).append(row)
    return "\n".join(f"{title}\n\n{_table(COLUMNS, map(_cells, group))}" for title, group in groups.items())


def update_readme(readme: Path, folder: Path) -> None:
    """Put the table of the results in `folder` between the two markers of a README.

    Links to the pages are relative, or absolute if those of the old table were: PyPI needs absolute links.

    Raises:
        ValueError: If the file does not exist or has no markers, or there are no results of a real model.
    """
    if not readme.is_file():
        raise ValueError(f"{readme} does not exist: name a file that has {OPEN} and {CLOSE} where the table belongs")
    head, opened, remainder = readme.read_text(encoding="utf-8").partition(OPEN)
    old, closed, tail = remainder.partition(CLOSE)
    if not (opened and closed):
        raise ValueError(f"{readme} has no table to replace: put {OPEN} and {CLOSE} where the table belongs")
    absolute = re.search(r"\]\((https?://\S+)/[^/)]+\.md\)", old)
    pages = absolute[1] if absolute else Path(os.path.relpath(folder, readme.parent)).as_posix()
    rows = [row for path in sorted(folder.glob("*.csv")) for row in from_csv(path)]
    readme.write_text(f"{head}{OPEN}\n{summary(rows, pages)}{CLOSE}{tail}", encoding="utf-8")


def summary(rows: Iterable[Row], pages: str) -> str:
    """The README's table, with the rule that selects its rows; `pages` is the address of the pages that it links to."""
    sections = largest(rows)
    if not sections:
        raise ValueError("no results of a real model: run `hf-xent bench` first, without --model random")
    lines = [line for section in sections for line in (_section(section[0], pages), *map(_summary_cells, section))]
    shown = [row for section in sections for row in section]
    dtypes = " and ".join(dtype for dtype in README_DTYPES if any(row.dtype == dtype for row in shown))
    return "\n".join((README.format(dtypes=dtypes), _table(SUMMARY_COLUMNS, lines), _legend(shown), ""))


def largest(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of the README: for each device and dtype, those of the largest inputs (N * V) of a real model."""
    sections: dict[tuple[str, int], dict[tuple[object, ...], list[Row]]] = {}
    for row in _ordered(rows):
        if row.real and row.objective == PLAIN and row.dtype in README_DTYPES and row.status in (OK, WRONG):
            section = sections.setdefault((row.device, README_DTYPES.index(row.dtype)), {})
            section.setdefault(row.inputs, []).append(row)
    return [max(groups.values(), key=_size) for _, groups in sorted(sections.items())]


def _size(group: list[Row]) -> tuple[int, ...]:
    row = group[0]
    return (row.N * row.V, row.D, row.threads)


def _ordered(rows: Iterable[Row]) -> list[Row]:
    """The rows in the order of CONTESTANTS; contestants that it no longer has come last."""
    order = {name: index for index, name in enumerate(CONTESTANTS)}
    return sorted(rows, key=lambda row: order.get(row.contestant, len(order)))


def _place(row: Row) -> tuple[object, ...]:
    """Where a row's table is on the page: other objectives follow cross-entropy on the same inputs."""
    return (row.dtype, row.source, row.D, row.V, row.N, row.objective != PLAIN, row.objective)


def _title(row: Row) -> str:
    versions = ", ".join(f"{name} {getattr(row, name)}" for name in PACKAGES if getattr(row, name))
    commit = f", commit {row.commit}" if row.commit else ""
    shape = f"{row.source}: N={row.N}, V={row.V}, D={row.D}, {row.dtype}"
    if row.objective != PLAIN:
        shape += f"; {OBJECTIVES[row.objective].about if row.objective in OBJECTIVES else row.objective}"
    return f"## {shape}\n\n{row.threads} threads; {versions}{commit}; {row.date[:10]}."


def _legend(rows: Iterable[Row]) -> str:
    """A sentence that describes the contestants of the rows."""
    names = dict.fromkeys(row.contestant for row in rows)
    known = [f"*{name}*: {CONTESTANTS[name].about}" for name in names if name in CONTESTANTS]
    return "; ".join(known) + "."


def _section(row: Row, pages: str) -> list[str]:
    """The line above the rows of one input, with a cell for each fact about it."""
    device = f"[{row.device}]({pages}/{stem(row.device)}.md): {row.source}"
    facts = (device, f"N={row.N}", f"V={row.V}", f"D={row.D}", row.dtype, f"{row.threads} threads")
    return [f"*{fact}*" for fact in facts]


COLUMNS = (
    "contestant",
    "time (ms)",
    "tokens/s",
    "time / dense",
    "time / matmuls",
    "peak (MiB)",
    "peak / logits",
    "loss error",
    "hidden grad error",
    "weight grad error",
    "note",
)
SUMMARY_COLUMNS = (
    "contestant",
    "time / dense",
    "peak (MiB)",
    "peak / logits",
    "hidden grad error",
    "weight grad error",
)


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    aligned = ["---" if name in ("contestant", "note") else "---:" for name in columns]
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, aligned, *lines))


def _cells(row: Row) -> list[str]:
    time = row.status if row.time_ms is None else f"{_time(row.time_ms)} ({_time(row.iqr_ms or 0.0)})"
    return [
        row.contestant,
        time,
        _number(row.tokens_per_s, ".0f"),
        _number(row.time_ratio, ".2f"),
        _number(row.matmul_ratio, ".2f"),
        *_memory(row),
        _number(row.loss_error, ".1e"),
        *_errors(row),
        row.note.replace("|", "/"),
    ]


def _summary_cells(row: Row) -> list[str]:
    name = f"**{row.contestant}**" if row.contestant.startswith("hf_xent") else row.contestant
    return [name, _number(row.time_ratio, ".2f") if row.status == OK else row.status, *_memory(row), *_errors(row)]


def _memory(row: Row) -> list[str]:
    return [_number(row.peak_mib, ".0f"), _number(row.peak_ratio, ".2f")]


def _errors(row: Row) -> list[str]:
    return [_number(row.hidden_error, ".1e"), _number(row.weight_error, ".1e")]


def _time(value: float) -> str:
    return format(value, ".0f" if value >= 100 else ".3g")


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)

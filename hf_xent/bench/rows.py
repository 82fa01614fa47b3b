"""What a benchmark leaves behind: `Row`, its environment, and the CSV and Markdown files of a device and dtype."""

from __future__ import annotations

import csv
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

OK, WRONG, ABSENT, FAILED = "ok", "wrong", "absent", "failed"
PACKAGES = ("torch", "transformers", "trl", "triton", "hf_xent")


@dataclass(frozen=True)
class Row:
    """One contestant on one input. Numbers are None where there is none: 'wrong' has no time, 'absent' nothing."""

    contestant: str
    status: str
    """'ok', 'wrong' (a gradient error beyond its tolerance), 'absent' (cannot run here) or 'failed'; see `note`."""
    time_ms: float | None = None
    """Median of the iterations: loss and both gradients."""
    iqr_ms: float | None = None
    """Interquartile range of the iterations."""
    repeats: int = 0
    tokens_per_s: float | None = None
    time_ratio: float | None = None
    """Median over the rounds of time / dense's time in the same round."""
    matmul_ratio: float | None = None
    """Median over the rounds of time / the time of the three bare matmuls in the same round."""
    peak_mib: float | None = None
    """Extra peak memory of an iteration, beyond inputs and produced gradients."""
    peak_ratio: float | None = None
    """`peak_mib` over the size of the dense logits, N * V * itemsize."""
    loss_error: float | None = None
    """|loss - truth| / |truth|."""
    hidden_error: float | None = None
    """Relative error of the hidden gradient, Frobenius norm."""
    weight_error: float | None = None
    """Relative error of the weight gradient, Frobenius norm."""
    hidden_tolerance: float | None = None
    """What the gate allowed `hidden_error` to be."""
    weight_tolerance: float | None = None
    """What the gate allowed `weight_error` to be."""
    note: str = ""
    """The chosen setting, or why there are no numbers."""
    N: int = 0
    V: int = 0
    D: int = 0
    dtype: str = ""
    source: str = ""
    device: str = ""
    threads: int = 0
    torch: str = ""
    transformers: str = ""
    trl: str = ""
    triton: str = ""
    hf_xent: str = ""
    commit: str = ""
    date: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What a newer row must share with an older one to replace it."""
        return (self.contestant, self.source, self.N, self.V, self.D, self.dtype, self.device, self.threads)


def environment(device: str, threads: int) -> dict[str, Any]:
    """The fields of a Row that describe where it was measured."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    versions = {name: _version(name) for name in PACKAGES}
    return {"device": device_name(device), "threads": threads, "commit": _commit(), "date": now, **versions}


def device_name(device: str) -> str:
    """The model of the GPU or CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def to_csv(rows: Iterable[Row], folder: Path | str) -> list[Path]:
    """Write `<device>-<dtype>.csv` files in `folder`; earlier rows stay unless measured again. Returns their paths."""
    return [_write_csv(path, found) for path, found in _files(rows, Path(folder)).items()]


def from_csv(path: Path | str) -> list[Row]:
    """The rows of a file that `to_csv` wrote."""
    kinds = {f.name: str(f.type) for f in fields(Row)}
    with Path(path).open(newline="", encoding="utf-8") as file:
        return [Row(**{k: _parse(v, kinds[k]) for k, v in row.items() if k in kinds}) for row in csv.DictReader(file)]


def to_markdown(rows: Iterable[Row], folder: Path | str) -> list[Path]:
    """Write `<device>-<dtype>.md` beside the CSV files, of all rows these hold, and return their paths."""
    paths = []
    for path, found in _files(rows, Path(folder)).items():
        target = path.with_suffix(".md")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(markdown(found), encoding="utf-8")
        paths.append(target)
    return paths


def markdown(rows: Iterable[Row]) -> str:
    """The rows as Markdown, one table an input and environment."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_title(row), []).append(row)
    return "\n".join(f"{title}\n\n{_table(found)}" for title, found in groups.items())


def _title(row: Row) -> str:
    versions = ", ".join(f"{name} {getattr(row, name)}" for name in PACKAGES if getattr(row, name))
    commit = f", commit {row.commit}" if row.commit else ""
    return (
        f"### {row.source}: N={row.N}, V={row.V}, D={row.D}, {row.dtype}\n\n"
        f"{row.device}, {row.threads} threads; {versions}{commit}; {row.date[:10]}."
        " Loss and both gradients, median (interquartile range); memory beyond inputs and gradients;"
        " errors relative to the truth."
    )


COLUMNS = (
    "contestant",
    "time (ms)",
    "tokens/s",
    "time / dense",
    "peak (MiB)",
    "peak / logits",
    "loss error",
    "hidden grad error",
    "weight grad error",
    "note",
)


def _table(rows: list[Row]) -> str:
    lines = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 2), "---"], *map(_cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: Row) -> list[str]:
    time = row.status if row.time_ms is None else f"{_time(row.time_ms)} ({_time(row.iqr_ms or 0.0)})"
    return [
        row.contestant,
        time,
        _number(row.tokens_per_s, ".0f"),
        _number(row.time_ratio, ".2f"),
        _number(row.peak_mib, ".0f"),
        _number(row.peak_ratio, ".2f"),
        _number(row.loss_error, ".1e"),
        _number(row.hidden_error, ".1e"),
        _number(row.weight_error, ".1e"),
        row.note.replace("|", "/"),
    ]


def _time(value: float) -> str:
    return format(value, ".0f" if value >= 100 else ".3g")


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _files(rows: Iterable[Row], folder: Path) -> dict[Path, list[Row]]:
    """Path of the CSV -> what it shall hold: its rows of now, each replaced by its newer measurement."""
    found: dict[Path, dict[tuple[Any, ...], Row]] = {}
    for row in rows:
        path = folder / f"{re.sub(r'[^a-z0-9]+', '-', row.device.lower()).strip('-')}-{row.dtype}.csv"
        if path not in found:
            found[path] = {old.key: old for old in from_csv(path)} if path.is_file() else {}
        found[path][row.key] = row
    return {path: list(kept.values()) for path, kept in found.items()}


def _write_csv(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return path


def _parse(text: str, kind: str) -> Any:
    if kind == "str":
        return text
    return None if text == "" else int(text) if kind == "int" else float(text)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """The commit of the source tree, '+' appended where it was edited since; '' for an installed package."""
    package = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(package), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != package.parent:
            return ""  # a virtual environment inside another repository
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "hf_xent") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""

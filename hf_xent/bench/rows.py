"""Results of a benchmark: `Row`, the environment it was measured in, and the CSV file of a device."""

from __future__ import annotations

import csv
import re
import subprocess
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..system.files import replace_atomically
from ..system.machine import cpu_name
from .config import shaped
from .objectives import PLAIN

OK, WRONG, ABSENT, FAILED = "ok", "wrong", "absent", "failed"
PEERS = ("liger_kernel", "cut_cross_entropy", "quack_kernels")
PACKAGES = ("torch", "transformers", "trl", "triton", *PEERS, "hf_xent")


@dataclass(frozen=True)
class Row:
    """One contestant on one input. Missing numbers are None: 'wrong' has no time, 'absent' no number."""

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
    """The largest `hidden_error` that the gate allowed."""
    weight_tolerance: float | None = None
    """The largest `weight_error` that the gate allowed."""
    note: str = ""
    """The chosen setting, or the reason for missing numbers."""
    N: int = 0
    V: int = 0
    D: int = 0
    dtype: str = ""
    source: str = ""
    objective: str = PLAIN
    device: str = ""
    threads: int = 0
    torch: str = ""
    transformers: str = ""
    trl: str = ""
    triton: str = ""
    liger_kernel: str = ""
    cut_cross_entropy: str = ""
    quack_kernels: str = ""
    hf_xent: str = ""
    commit: str = ""
    date: str = ""

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The fields that rows must share to be compared."""
        return (self.source, self.N, self.V, self.D, self.dtype, self.objective, self.device, self.threads)

    @property
    def key(self) -> tuple[Any, ...]:
        """The fields that a newer row must share with an older one to replace it."""
        return (self.contestant, *self.inputs)

    @property
    def real(self) -> bool:
        """Whether the inputs come from a model, and are not generated."""
        return not shaped(self.source)


def environment(device: str, threads: int) -> dict[str, Any]:
    """The fields of a Row that describe where it was measured."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    versions = {name: _version(name) for name in PACKAGES}
    return {"device": device_name(device), "threads": threads, "commit": _commit(), "date": now, **versions}


def device_name(device: str) -> str:
    """The model of the GPU or CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return cpu_name()


def to_csv(rows: Iterable[Row], folder: Path | str) -> list[Path]:
    """Write rows into the CSV files of their devices; earlier rows are kept unless they were measured again.

    Args:
        rows: Rows of one or more devices.
        folder: The folder of the files, `<device>.csv`.

    Returns:
        The paths of the files.

    Raises:
        ValueError: If such a file exists but holds no benchmark results.
    """
    return [_write_csv(path, merged) for path, merged in _files(rows, Path(folder)).items()]


def stem(device: str) -> str:
    """The name of a device's files without their suffix."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def from_csv(path: Path | str) -> list[Row]:
    """Read the rows of a file that `to_csv` wrote.

    Raises:
        ValueError: If the file holds no benchmark results.
    """
    kinds = {f.name: str(f.type) for f in fields(Row)}
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = [{k: _parse(v, kinds[k]) for k, v in row.items() if k in kinds} for row in csv.DictReader(file)]
    if not rows or any(f.default is MISSING and f.name not in rows[0] for f in fields(Row)):
        raise ValueError(f"{path} holds no benchmark results: name the folder that has them, or remove it")
    return [Row(**row) for row in rows]


def _files(rows: Iterable[Row], folder: Path) -> dict[Path, list[Row]]:
    """Path of a CSV file -> the rows to write: the existing ones, or their newer measurements, and new ones."""
    files: dict[Path, dict[tuple[Any, ...], Row]] = {}
    for row in rows:
        path = folder / f"{stem(row.device)}.csv"
        if path not in files:
            files[path] = {old.key: old for old in from_csv(path)} if path.is_file() else {}
        files[path][row.key] = row
    return {path: list(merged.values()) for path, merged in files.items()}


def _write_csv(path: Path, rows: list[Row]) -> Path:
    def write(draft: Path) -> None:
        with draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)

    return replace_atomically(path, write)  # if a sweep is interrupted here, no row is lost


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
    """The commit of the source tree, with '+' if the files differ from it; '' for an installed package."""
    package = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        process = subprocess.run(["git", "-C", str(package), *args], capture_output=True, text=True, check=True)
        return process.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != package.parent:
            return ""  # a virtual environment inside another repository
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", str(package)) else "")
    except (OSError, subprocess.CalledProcessError):
        return ""

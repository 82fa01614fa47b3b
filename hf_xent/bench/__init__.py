"""Floor 4: the benchmark. `run(BenchConfig(...))` returns rows, `to_csv` saves them, `write_page` writes their page.

`run` gives every contestant a process; `run_shared`, for GPUs, gives one to a group of contestants.

`PeakMemory` and the contestants can also be used on their own.
"""

from typing import Any

from ..system import renamed
from .config import BenchConfig
from .contestants import CONTESTANTS, Contestant
from .journal import Journal
from .measure import run
from .memory import PeakMemory
from .objectives import OBJECTIVES, Objective
from .pages import markdown, update_readme, write_page
from .progress import progress
from .rows import Row, from_csv, to_csv
from .shared import run_shared
from .sweep import sweep

__all__ = [
    "CONTESTANTS",
    "OBJECTIVES",
    "BenchConfig",
    "Contestant",
    "Journal",
    "Objective",
    "PeakMemory",
    "Row",
    "from_csv",
    "markdown",
    "progress",
    "run",
    "run_shared",
    "sweep",
    "to_csv",
    "update_readme",
    "write_page",
]


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)

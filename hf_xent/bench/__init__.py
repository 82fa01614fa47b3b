"""Floor 4: the benchmark. `run(BenchConfig(...))` gives rows, `to_csv` keeps them, `write_page` makes a page of them.

`hf_xent.bench.memory.PeakMemory` and the contestants stand alone.
"""

from typing import Any

from ..system import renamed
from .config import BenchConfig
from .contestants import CONTESTANTS, Contestant
from .measure import run
from .memory import PeakMemory
from .pages import markdown, update_readme, write_page
from .progress import progress
from .rows import Row, from_csv, to_csv
from .sweep import sweep

__all__ = [
    "CONTESTANTS",
    "BenchConfig",
    "Contestant",
    "PeakMemory",
    "Row",
    "from_csv",
    "markdown",
    "progress",
    "run",
    "sweep",
    "to_csv",
    "update_readme",
    "write_page",
]


def __getattr__(name: str) -> Any:
    return renamed.attribute(__name__, name)

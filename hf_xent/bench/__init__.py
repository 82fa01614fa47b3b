"""Floor 4: the benchmark. `run(BenchConfig(...))` gives rows, `to_csv` keeps them, `publish` makes a page of them.

`hf_xent.bench.memory.PeakMemory` and the contestants stand alone.
"""

from .contestants import CONTESTANTS, Contestant
from .measure import BenchConfig, run
from .memory import PeakMemory
from .pages import markdown, publish, rewrite
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
    "publish",
    "rewrite",
    "run",
    "sweep",
    "to_csv",
]

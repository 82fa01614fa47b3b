"""Floor 4: the benchmark. `run(BenchConfig(...))` gives rows, `to_csv` and `to_markdown` keep them.

`hf_xent.bench.memory.PeakMemory` and the contestants stand alone.
"""

from .contestants import CONTESTANTS, Contestant
from .measure import BenchConfig, run
from .memory import PeakMemory
from .progress import progress
from .rows import Row, from_csv, markdown, to_csv, to_markdown

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
    "to_csv",
    "to_markdown",
]

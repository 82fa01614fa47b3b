"""What the machine says of itself."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def cpu_name() -> str:
    """The processor's model; where the system does not tell it, the architecture."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    return model[1].strip() if model else platform.processor() or platform.machine()

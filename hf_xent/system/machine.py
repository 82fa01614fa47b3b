"""The hardware that the program runs on."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def cpu_name() -> str:
    """The processor's model, or its architecture if the system does not report the model."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    return model[1].strip() if model else platform.processor() or platform.machine()

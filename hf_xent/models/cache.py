"""Where derived files are kept from one run to the next: unpacked models, token counts, activations."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder of derived files: HF_XENT_CACHE, else `hf_xent` in XDG_CACHE_HOME, else ~/.cache/hf_xent."""
    if chosen := os.environ.get("HF_XENT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_xent"

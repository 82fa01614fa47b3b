"""Files and folders that appear complete: each is written as a draft beside its path and moved there in one step.

Readers and concurrent writers never see a part of one, and a process that is stopped loses nothing that existed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(folder: Path, write: Callable[[Path], Any]) -> Path:
    """Create `folder` by `write(draft)`, and return it. A folder that exists already, or that another process
    finished first, is kept.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        draft.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        write(draft)
        os.replace(draft, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def replace_atomically(file: Path, write: Callable[[Path], Any]) -> Path:
    """Write `file` by `write(draft)`, in place of an existing one, and return it. The draft has the same suffix."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        write(draft)
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
    return file

"""Floor 3: teachers, one file per kind. A teacher answers a batch with targets for a distillation loss.

load("smollm2")                        a local model: `LocalTeacher`
load("out/cache")                      a folder that `write_cache` has written: `StoredTeacher`
load("http://localhost:8000/v1")       a server: `ServedTeacher`
load(["smollm2", "out/cache"])         several, with weights: `SeveralTeachers`
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

FILES = {
    "LocalTeacher": "local",
    "OtherVocabularyTeacher": "other_vocabulary",
    "PaddedTeacher": "other_vocabulary",
    "ServedTeacher": "served",
    "SeveralTeachers": "several",
    "StoredTeacher": "stored",
    "Teacher": "base",
    "load": "loading",
    "write_cache": "writing",
}
"""Public name -> the file that has it; each is imported on first use."""

__all__ = sorted(FILES)


def __getattr__(name: str) -> Any:
    if name not in FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{FILES[name]}", __name__), name)

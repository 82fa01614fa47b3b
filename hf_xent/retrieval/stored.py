"""Rows of a grid on disk, one file for each source, so that an interrupted grid goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..system.files import replace_atomically


class StoredRows:
    """The rows of a grid by what their sources are; sources may be added, reordered and repeated.

    Args:
        folder: The folder; None keeps rows in memory alone.
        settings: What all rows depend on: the model and the candidates.

    Raises:
        ValueError: The folder has rows of other settings.
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any]):
        self.folder = None if folder is None else Path(folder)
        self.known: dict[str, np.ndarray] = {}
        if self.folder is None:
            return
        file = self.folder / "settings.json"
        if file.exists():
            stored = json.loads(file.read_text())
            if differing := sorted(name for name in {*stored, *settings} if stored.get(name) != settings.get(name)):
                raise ValueError(
                    f"folder is {str(folder)!r}, whose rows were computed with another {' and '.join(differing)}:"
                    " choose another folder"
                )
        else:
            replace_atomically(file, lambda draft: draft.write_text(json.dumps(dict(settings), indent=1)))

    def get(self, key: str) -> np.ndarray | None:
        """The row of a source, or None if it is not known."""
        if key not in self.known and self.folder is not None and (file := self._file(key)).exists():
            self.known[key] = np.load(file)
        return self.known.get(key)

    def add(self, key: str, row: np.ndarray) -> None:
        """Keep the row of a source."""
        self.known[key] = row
        if self.folder is not None:
            replace_atomically(self._file(key), lambda draft: np.save(draft, row))

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / "rows" / f"{key}.npy"


def key_of(inputs: Mapping[str, Tensor]) -> str:
    """What a source is, by the contents of its tensors."""
    digest = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(repr(value.tolist()).encode() if value.numel() < 4096 else value.numpy().tobytes())
    return digest.hexdigest()[:32]

"""A file that keeps the finished chunks of a long computation: a line of settings, then a JSON line for each chunk.

draft = Draft(Path(".scores.partial"), settings)        # draft.chunks has what a stopped run with these settings left
with draft.appending() as append:
    for chunk in todo(len(draft.chunks)):
        append(compute(chunk))                           # it is on disk before the next one begins
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Draft:
    """The chunks of a computation, in memory and on disk; the file is not deleted.

    Args:
        file: The file; its folder is created.
        settings: All that the chunks depend on, on one line; chunks that were computed under others are discarded.
    """

    def __init__(self, file: Path, settings: str):
        self.file, self.settings = file, settings
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.chunks: list[Any] = []
        for line in lines[1:] if lines[:1] == [settings] else []:
            try:
                self.chunks.append(json.loads(line))
            except ValueError:  # the line that was being written when the run stopped
                break

    @contextmanager
    def appending(self) -> Iterator[Callable[[Any], None]]:
        """Write the chunks that are kept, and give a function that appends one to `chunks` and to the file."""
        self.file.write_text("\n".join([self.settings, *map(json.dumps, self.chunks), ""]), encoding="utf-8")
        with self.file.open("a", encoding="utf-8") as stream:

            def append(chunk: Any) -> None:
                stream.write(json.dumps(chunk) + "\n")
                stream.flush()
                self.chunks.append(chunk)

            yield append

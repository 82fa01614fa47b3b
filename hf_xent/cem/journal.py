"""The finished trials of a search, on disk after each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..system.files import replace_atomically


class Journal:
    """The trials of a search, in a file that holds its settings, too.

    Args:
        file: The file; existing trials are read.
        settings: What determines the candidates and what their scores mean.

    Raises:
        ValueError: If the file cannot be read, or has other settings.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file, self.settings = file, json.loads(json.dumps(settings))
        self.trials: dict[int, dict[str, Any]] = {}
        """Number -> `parameters`, `score` (None if it failed), `scores` by seed and `error`."""
        if not file.exists():
            return
        try:
            stored = json.loads(file.read_text())
            found, trials = stored["settings"], {trial["number"]: trial for trial in stored["trials"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} holds no trials of a search ({error!r}): move it away") from error
        for name in sorted(found.keys() | self.settings.keys()):
            if found.get(name) != self.settings.get(name):
                raise ValueError(
                    f"{file} has trials under {name} {found.get(name)}, but this search has {self.settings.get(name)}:"
                    " choose another output folder"
                )
        self.trials = trials

    def has(self, number: int, params: Mapping[str, Any]) -> bool:
        """Whether a trial is finished.

        Raises:
            ValueError: If it was run with other parameters.
        """
        if number not in self.trials:
            return False
        found = self.trials[number]["parameters"]
        if found != json.loads(json.dumps(dict(params))):
            raise ValueError(f"{self.file} has trial {number} with {found}, now it is {dict(params)}: move it away")
        return True

    def record(self, number: int, params: Mapping[str, Any], scores: list[float] | None, error: str | None) -> None:
        """Keep a trial, on disk too.

        Args:
            number: Its place in the search.
            params: Name -> value.
            scores: One for each seed, or None if it failed.
            error: Why it failed.
        """
        score = None if scores is None else sum(scores) / len(scores)
        self.trials[number] = {
            "number": number, "parameters": dict(params), "score": score, "scores": scores, "error": error,
        }  # fmt: skip
        stored = {"settings": self.settings, "trials": [self.trials[k] for k in sorted(self.trials)]}
        text = json.dumps(stored, indent=1)
        replace_atomically(self.file, lambda draft: draft.write_text(text))

    def score(self, number: int) -> float:
        """The score of a finished trial; nan if it failed."""
        score = self.trials[number]["score"]
        return float("nan") if score is None else float(score)

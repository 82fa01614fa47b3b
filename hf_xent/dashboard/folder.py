"""What there is to show in a folder: every file that is known is read into one `Folder`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import records, training
from .cards import read_card, read_pictures
from .contents import Folder
from .samples import read_samples

RESULTS: dict[str, Callable[[Folder, Any], None]] = {
    "outcomes": training.read_outcomes,
    "attacks": records.read_attacks,
    "results": records.read_study,
}
"""The key by which a `results.json` is known -> its reader."""
LOOKED_FOR = (
    "results.json of a command or a study, trainer_state.json (also of the newest checkpoint), trials.json,"
    " *.report.json of `hf-xent detect`"
)


def read(path: str | Path) -> Folder:
    """Reads the folder of a run.

    Args:
        path: A folder that a command, a study or a trainer of transformers has written.

    Returns:
        Its charts, tables, settings, samples, card and pictures.

    Raises:
        ValueError: There is no such folder, it has nothing to show, or a file in it cannot be read.
    """
    folder = Folder(Path(path))
    if not folder.path.is_dir():
        raise ValueError(f"folder is {path}, which is no folder: name the output folder of a run")
    for name, reader in (("results.json", _read_results), ("trials.json", records.read_trials)):
        _use(folder, folder.path / name, reader)
    for file in sorted(folder.path.glob("*.report.json")):
        _use(folder, file, records.read_detection)
    if state := training.state_of(folder.path):
        _use(folder, state, training.read_state)
    if not folder.kinds:
        raise ValueError(f"folder is {path}, in which there is nothing to show: {LOOKED_FOR}{_below(folder.path)}")
    read_samples(folder)
    read_card(folder)
    read_pictures(folder)
    return folder


def _use(folder: Folder, file: Path, reader: Callable[[Folder, Any], None]) -> None:
    """Has a JSON file read, if it is there. Raises: ValueError if it is not what its name says."""
    if not file.is_file():
        return
    try:
        reader(folder, json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{file} is not what a run writes under this name ({reason}): move it away") from error
    folder.files.append(str(file.relative_to(folder.path)))


def _read_results(folder: Folder, stored: Any) -> None:
    for key, reader in RESULTS.items():
        if key in stored:
            return reader(folder, stored)
    raise ValueError(f"it has none of the keys {', '.join(RESULTS)}")


def _below(path: Path) -> str:
    """The folders inside that have something to show, as the end of a message."""
    names = ("results.json", "trainer_state.json", "trials.json", "*.report.json")
    found = sorted({file.parent for name in names for file in path.glob(f"*/{name}")})
    if not found:
        return ""
    return f"; name a folder inside, such as {', '.join(str(folder) for folder in found[:3])}"

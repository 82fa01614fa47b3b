"""Files that hold rows: of one kind, in a folder, in a zip, or named by split."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""File suffix -> builder of `datasets`."""


def readable(path: Path) -> tuple[str, list[Path]]:
    """The builder for a file, or for all files of a folder in the order of their paths; what systems hide is skipped.

    Raises: ValueError where there are none, or of several kinds.
    """
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in BUILDERS and _shown(f, path))
    kinds = {BUILDERS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        found = ", ".join(sorted({file.suffix for file in files})) or "none of them"
        raise ValueError(f"{path}: files of one kind among {', '.join(BUILDERS)} are read, found {found}")
    [kind] = kinds
    return str(kind), files


def located(path: Path, splits: Iterable[str]) -> dict[str, Any]:
    """What `datasets.load_dataset` takes for a local copy of a published dataset with these splits.

    A folder whose README.md names its files is read as the Hub reads it. Elsewhere a file belongs to the split its name
    is or begins with ('validation.jsonl', 'train-00000-of-00002.parquet'); with one split, all files do.
    """
    if not path.exists():
        raise ValueError(f"path is {str(path)!r}: there is no such file or folder")
    path = unpacked(path) if path.suffix == ".zip" else path
    if _names_its_files(path / "README.md"):
        return {"path": str(path)}
    kind, files = readable(path)
    names = list(splits)
    groups = {name: [str(f) for f in files if f.stem == name or f.name.startswith(f"{name}-")] for name in names}
    groups = {name: found for name, found in groups.items() if found}
    if not groups and len(names) == 1:
        groups = {names[0]: [str(file) for file in files]}
    if not groups:
        raise ValueError(f"{path}: no file is named after a split; name them {', '.join(f'{n}.jsonl' for n in names)}")
    return {"path": kind, "data_files": groups}


def unpacked(path: Path) -> Path:
    """The folder a zip was unpacked into, in the cache of `datasets`."""
    from datasets import DownloadConfig, DownloadManager, config

    # by force: the cache goes by the path alone, and the file there may be another by now
    options = DownloadConfig(cache_dir=config.HF_DATASETS_CACHE, force_extract=True)
    return Path(DownloadManager(download_config=options).extract(str(path)))


def first_line(error: BaseException) -> str:
    """The first line of the innermost cause: `datasets` wraps the one that says something."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0] or type(error).__name__


def _shown(file: Path, folder: Path) -> bool:
    return not any(part.startswith((".", "__MACOSX")) for part in file.relative_to(folder).parts)


def _names_its_files(readme: Path) -> bool:
    from huggingface_hub import DatasetCard

    return readme.is_file() and "configs" in DatasetCard(readme.read_text(encoding="utf-8")).data

"""Reads rows from files: of one type, in a folder, in a zip, or named by split. Contents are not changed.

    .txt               one row per file, without its byte order mark
    .csv, .tsv         rows of text: 007 and NA stay text, an empty cell is an empty text
    .json, .jsonl, .ndjson, .parquet   rows with the types of the file
    a folder of `Dataset.save_to_disk`, likewise

All but Parquet may be compressed (.gz, .bz2, .xz). Suffixes may be in upper case, paths are never read as patterns, and
links are followed.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..system.access import refusal

BUILDERS = {
    ".txt": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet",
}  # fmt: skip
"""File suffix -> kind."""
SAVED = "saved"
"""The kind of a folder that `Dataset.save_to_disk` wrote."""
COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Suffix of a compression, which follows that of the kind -> function that opens the file."""
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
"""Byte order mark -> encoding; UTF-32 is first, as its mark begins with that of UTF-16."""
NUMBERS = {
    "int64": re.compile(r"[+-]?[0-9]+"),
    "float64": re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"),
    "bool": re.compile(r"true|false|True|False|TRUE|FALSE"),
}
"""Type -> pattern of its values in a text file."""


def suffix_of(file: Path) -> str:
    """The suffix that determines the kind of a file, in lower case and without that of a compression."""
    return _plain(file).suffix.lower()


def expanded_path(source: str | Path) -> Path:
    """The path as given if it exists, else with '~' expanded to the home folder."""
    path = Path(source)
    if os.path.exists(path):  # unlike Path.exists, it returns False for a name that is too long
        return path
    try:
        return path.expanduser()
    except RuntimeError:  # '~name' of an unknown user
        return path


def files_of(path: Path) -> tuple[str, list[Path]]:
    """The kind of a file, or of all files of a folder in the order of their paths; hidden files are skipped.

    Raises: ValueError if there are no files, several kinds of them, or a broken link.
    """
    if path.is_file():
        return kind_of(path, [path])
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(part.name for part in path.iterdir() if part.is_dir()))
        raise ValueError(f"{path} has several splits, as save_to_disk wrote them: name the folder of one ({splits})")
    if all((path / name).is_file() for name in ("state.json", "dataset_info.json")):
        return SAVED, [path]
    files = sorted(file for file in _within(path) if suffix_of(file) in BUILDERS and _is_visible(file, path))
    if broken := [file for file in files if file.is_symlink() and not file.exists()]:
        raise ValueError(
            f"{broken[0]} is a link to {os.readlink(broken[0])}, which does not exist: repair or remove it"
        )
    return kind_of(path, [file for file in files if file.is_file()])


def kind_of(path: Path, files: list[Path]) -> tuple[str, list[Path]]:
    """The single kind of the files that are at a path, and the files. Raises: ValueError as `files_of`."""
    kinds = {BUILDERS.get(suffix_of(file)) for file in files}
    if len(kinds) != 1 or None in kinds:
        suffixes = ", ".join(sorted({suffix_of(file) or file.name for file in files})) or "none of them"
        raise ValueError(f"{path} has files {suffixes}: pass files of one kind among {', '.join(BUILDERS)}")
    [kind] = kinds
    return str(kind), files


def table(kind: str, files: Iterable[Path], *, streaming: bool = False) -> Any:
    """The rows of files of one kind, one file after the other, as a `datasets.Dataset` or a stream.

    Raises: an error of `datasets`, or a ValueError in its chain of causes, for a file that cannot be read.
    """
    from datasets import Dataset, Features, IterableDataset, Value, load_dataset  # lazy: half a second

    files = list(files)
    if kind == SAVED:
        [saved] = (Dataset.load_from_disk(str(folder)) for folder in files)
        return saved.to_iterable_dataset() if streaming else saved
    if not any(file.stat().st_size for file in files) or (kind == "parquet" and not _rows(files)):
        raise ValueError("there is nothing in it")
    if kind in ("json", "parquet"):
        if wrong := [file for file in files if "::" in str(file)]:
            raise ValueError(f"{wrong[0]} has '::' in its name, which `datasets` splits it at: rename it")
        names = [glob.escape(str(file)) for file in files]  # they would be read as patterns
        options = {"encoding": "utf-8-sig"} if kind == "json" else {}  # by default the encoding is not checked
        return load_dataset(kind, data_files=names, split="train", streaming=streaming, **options)
    columns = ["text"] if kind == "text" else _columns(files)
    features = Features({name: Value("string") for name in columns})
    # the cache of `datasets` hashes the time stamps, so a file that has changed is read again
    stamped = {"stamped": tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)}
    rows = _documents if kind == "text" else _cells
    if streaming:
        return IterableDataset.from_generator(rows, features=features, gen_kwargs=stamped)
    return Dataset.from_generator(rows, features=features, gen_kwargs=stamped)


def inferred_type(cells: Iterable[str]) -> str | None:
    """The type of a column whose cells are all written as numbers or as truth values; None for text."""
    candidates = dict(NUMBERS)
    for cell in filter(None, cells):
        candidates = {name: pattern for name, pattern in candidates.items() if pattern.fullmatch(cell)}
        if not candidates:
            return None
    return next(iter(candidates)) if len(candidates) < len(NUMBERS) else None


def files_by_split(path: Path, splits: Iterable[str]) -> dict[str, tuple[str, list[Path]]]:
    """Split -> kind and files of a local copy of a published dataset with these splits.

    A folder whose README.md names its files is read as the Hub reads it. Elsewhere a file belongs to the split that its
    name equals or begins with ('validation.jsonl', 'train-00000-of-00002.parquet'); with one split, all files do.
    """
    if not path.exists():
        raise ValueError(f"path is {str(path)!r}: there is no such file or folder, pass an existing one")
    path = unpacked(path) if path.suffix.lower() == ".zip" else path
    if files_in_readme := _files_in_readme(path):
        return {split: kind_of(path, files) for split, files in files_in_readme.items()}
    kind, files = files_of(path)
    names = list(splits)
    groups = {name: [f for f in files if _stem(f) == name or f.name.startswith(f"{name}-")] for name in names}
    groups = {name: group for name, group in groups.items() if group}
    if not groups and len(names) == 1:
        groups = {names[0]: files}
    if not groups:
        raise ValueError(f"{path}: no file is named after a split; name them {', '.join(f'{n}.jsonl' for n in names)}")
    return {name: (kind, group) for name, group in groups.items()}


def unpacked(path: Path) -> Path:
    """Unpacks a zip into the cache of `datasets`, and returns the folder."""
    from datasets import DownloadConfig, DownloadManager, config

    # forced, since the cache compares paths alone, and the file may have changed
    options = DownloadConfig(cache_dir=config.HF_DATASETS_CACHE, force_extract=True)
    return Path(DownloadManager(download_config=options).extract(str(path)))


def first_line(error: BaseException) -> str:
    """The first line of the innermost cause, since `datasets` wraps the informative error in others; or a refusal."""
    if (told := refusal(error)) is not None:
        return told
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        return f"it is not {error.encoding.upper()} ({error}): save it in that encoding"
    return str(error).strip().split("\n")[0] or type(error).__name__


def _opened(file: Path, **options: Any) -> Any:
    """Opens a file as text, in UTF-8 or the encoding of its byte order mark, which is left out."""
    opener = COMPRESSED.get(file.suffix.lower(), open)
    with opener(file, "rb") as start:
        head = start.read(4)
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in head:
        raise ValueError("it begins with NUL, as UTF-16 without a byte order mark or binary data: save it as UTF-8")
    return opener(file, "rt", encoding=encoding, **options)


def _rows(files: Iterable[Path]) -> int:
    """The number of rows of Parquet files."""
    from pyarrow import parquet

    return sum(parquet.read_metadata(file).num_rows for file in files)


def _documents(stamped: Iterable[tuple[str, int, int]]) -> Iterator[dict[str, str]]:
    """One row per file."""
    for name, *_ in stamped:
        with _errors_with_name(name), _opened(Path(name)) as file:
            yield {"text": file.read()}


def _cells(stamped: Iterable[tuple[str, int, int]]) -> Iterator[dict[str, str]]:
    """The rows of tables."""
    for name, *_ in stamped:
        with _errors_with_name(name), _opened(Path(name), newline="") as file:
            for part in _parsed(file, name, chunksize=10_000):
                yield from part.to_dict("records")


@contextmanager
def _errors_with_name(name: str) -> Iterator[None]:
    """Adds the name of the file, one of several, to errors of reading it."""
    try:
        yield
    except (ValueError, EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{Path(name).name}: {first_line(error)}") from None


def _parsed(file: Any, name: str, **options: Any) -> Any:
    """A table read by pandas, every cell as text."""
    import pandas  # lazy: half a second, and a dependency of `datasets`

    separator = "\t" if suffix_of(Path(name)) == ".tsv" else ","
    return pandas.read_csv(file, sep=separator, dtype=str, na_filter=False, **options)


def _columns(files: Iterable[Path]) -> list[str]:
    """The columns of tables, which have to be the same in all of them.

    Raises: ValueError for a header with too few names, or the same one twice.
    """
    headers: dict[tuple[str, ...], Path] = {}
    rows = 0
    for file in files:
        with _errors_with_name(str(file)), _opened(file, newline="") as stream:
            head = _parsed(stream, file.name, nrows=1)
            if not head.index.equals(head.reset_index(drop=True).index):  # pandas reads the first fields as row names
                raise ValueError("rows have more fields than the header: put texts that have commas in quotes")
            stream.seek(0)
            names = [name for name in _parsed(stream, file.name, nrows=1, header=None).iloc[0] if name]
            if repeated := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"the header names the column {repeated[0]!r} twice: rename or remove one")
            rows += len(head)
            headers.setdefault(tuple(map(str, head.columns)), file)
    if len(headers) > 1:
        listed = "; ".join(f"{file.name} has {', '.join(columns)}" for columns, file in headers.items())
        raise ValueError(f"the tables have different columns: {listed}")
    if not rows:
        raise ValueError("it has a header and no rows")
    [columns] = headers
    return list(columns)


def _plain(file: Path) -> Path:
    """A file's name without the suffix of a compression."""
    return Path(file.stem if file.suffix.lower() in COMPRESSED else file.name)


def _stem(file: Path) -> str:
    return _plain(file).stem


def _within(folder: Path) -> Iterator[Path]:
    """All files in a folder and its subfolders, linked ones included, each folder once."""
    seen = set()
    for current, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if (real := os.path.realpath(current)) in seen:  # such as by a link to a parent folder
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(current, name) for name in names)


def _is_visible(file: Path, folder: Path) -> bool:
    return not any(part.startswith((".", "__MACOSX")) for part in file.relative_to(folder).parts)


def _files_in_readme(folder: Path) -> dict[str, list[Path]]:
    """Split -> files, as the README.md of a folder names them; empty if it names none."""
    from huggingface_hub import DatasetCard

    readme = folder / "README.md"
    configs = DatasetCard(readme.read_text(encoding="utf-8")).data.get("configs") if readme.is_file() else None
    if not configs:
        return {}
    chosen = next((c for c in configs if c.get("default") or c["config_name"] == "default"), configs[0])
    entries = chosen["data_files"]
    entries = [entries] if isinstance(entries, (str, dict)) else entries
    parts: dict[str, list[Path]] = {}
    for entry in entries:
        split, paths = ("train", entry) if isinstance(entry, str) else (entry["split"], entry["path"])
        for pattern in [paths] if isinstance(paths, str) else paths:
            parts.setdefault(split, []).extend(sorted(file for file in folder.glob(pattern) if file.is_file()))
    if empty := [split for split, files in parts.items() if not files]:
        raise ValueError(f"{readme} names files of the split {empty[0]} that are not there: add them, or correct it")
    return parts

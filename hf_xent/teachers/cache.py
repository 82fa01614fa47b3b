"""A cache folder: what a teacher says about a data set, document by document, in Arrow files.

    cache.json                      what is stored, of which teacher and data: `Cache`
    data-00000-of-00012.arrow       documents: `input_ids` and the columns of `forms`, mapped into memory
    head.safetensors                the teacher's head, beside hidden states
    README.md                       the card

A file is there when it is complete, so what a stopped run has written is what the next one skips.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..system.files import replace_atomically
from .forms import Form

INFO = "cache.json"
FORMAT = 1


@dataclass(frozen=True)
class Cache:
    """What a cache holds, and how it is cut into files and batches; a run with other values is another cache."""

    form: Form
    teacher: str
    """The Hub id of the teacher, or the name of its folder, or that of a server's model."""
    weights: str
    """A fingerprint of the teacher's configuration and weights; empty for one that is not a model here."""
    tokenizer: str
    """A fingerprint of the tokenizer; empty if it is not known."""
    dataset: str
    """What the data are called."""
    content: str
    """A hash of all token ids."""
    rows: int
    tokens: int
    shard_rows: int
    """Documents in a file."""
    batch_rows: int
    """Documents in a forward pass: rounding depends on what is computed together."""

    def described(self) -> dict[str, Any]:
        """All fields by name, those of the form among them, with the version of the format."""
        fields = asdict(self)
        return {"format": FORMAT, **fields.pop("form"), **fields}

    def shards(self, folder: Path) -> list[Path]:
        """The paths of all files of documents, whether they exist yet or not."""
        count = -(-self.rows // self.shard_rows)
        return [folder / f"data-{i:05}-of-{count:05}.arrow" for i in range(count)]

    def claim(self, folder: Path) -> None:
        """Make the folder that of this cache.

        Raises:
            ValueError: It holds another cache, or something else.
        """
        if is_cache(folder):
            found, ours = read(folder).described(), self.described()
            other = next((name for name in ours if found[name] != ours[name]), None)
            if other is not None:
                raise ValueError(
                    f"{folder} holds a cache with {other} = {_shown(found[other])}, not {_shown(ours[other])}: choose"
                    " another folder, or the same settings"
                )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"folder is {str(folder)!r}, which is no cache and not empty: choose another")
        else:
            text = json.dumps(self.described(), indent=2) + "\n"
            replace_atomically(folder / INFO, lambda draft: draft.write_text(text, encoding="utf-8"))


def is_cache(path: str | Path) -> bool:
    """Whether a path is a cache folder, complete or not."""
    return (Path(path) / INFO).is_file()


def read(folder: Path) -> Cache:
    """What a cache folder holds.

    Raises:
        ValueError: It has no readable description, or that of another version.
    """
    try:
        values = json.loads((folder / INFO).read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        form = Form(**{name: values.pop(name) for name in ("kind", "k", "dtype", "temperature")})
        return Cache(form, **values)
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} is no cache that this version reads ({reason}): write it again") from error


def documents(folder: Path) -> Any:
    """The documents of a complete cache, as a `datasets.Dataset` that is mapped into memory.

    Raises:
        ValueError: The cache is not complete.
    """
    from datasets import Dataset, concatenate_datasets

    shards = read(folder).shards(folder)
    if missing := [path for path in shards if not path.is_file()]:
        raise ValueError(
            f"the cache {folder} lacks {len(missing)} of its {len(shards)} files: run the command that writes it again,"
            " which continues"
        )
    return concatenate_datasets([Dataset.from_file(str(path)) for path in shards])


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""`write_cache`: what a teacher says about a data set, into a folder, file by file, and on from there after a stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..losses.targets import TopK
from ..models.fingerprints import fingerprint_model, fingerprint_tokenizer
from ..models.padding import padded
from ..ops import Head
from ..ops.top_k import top_k_of
from ..options.ranges import check_count
from ..patching import inner_of
from ..system.files import replace_atomically
from .base import Teacher
from .cache import Cache
from .forms import Form, factors_of
from .heads import FILE, load_head, save_head
from .local import LocalTeacher
from .other_vocabulary import PaddedTeacher
from .stored import IDS

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Written:
    """What is in a cache, and what a run of `write_cache` did for it."""

    folder: Path
    cache: Cache
    bytes: int
    """Size of the files of documents."""
    head_bytes: int
    """Size of the teacher's head beside hidden states; else 0."""
    seconds: float
    skipped: int
    """Files that were there before."""

    @property
    def bytes_per_token(self) -> float:
        """Size of a token in the files of documents, its id and what Arrow adds included."""
        return self.bytes / max(1, self.cache.tokens)


def write_cache(
    teacher: Teacher,
    dataset: Any,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    source: str = "",
    progress: Progress | None = None,
    **options: Any,
) -> Written:
    """Write what a teacher says about a data set; a run that was stopped continues with the file it was stopped in.

    The result does not depend on where it was stopped, byte for byte, since what is computed together is fixed.

    Args:
        teacher: The teacher.
        dataset: A `datasets.Dataset`, or any sequence of rows, with `input_ids`: a row is a document, without padding.
        folder: A new folder, or one with a part of the same cache.
        tokenizer: The tokenizer of the data, whose fingerprint is kept.
        source: What the data are called.
        progress: Called with the number of tokens that are done and of all.
        **options: `kind`, `k`, `dtype` and `temperature` of `hf_xent.teachers.forms.Form`; `shard_rows` (256),
            documents in a file; `batch_rows` (8), documents in a forward pass.

    Returns:
        What was written.

    Raises:
        ValueError: An option is unknown or out of its range, the data set has no documents, the folder has another
            cache, or the teacher does not say what the kind needs.
    """
    start, folder, teacher = time.perf_counter(), Path(folder), _asked(teacher)
    dataset = dataset.select_columns([IDS]).with_format("numpy") if _has_ids(dataset) else dataset
    cache, numbers = _plan(teacher, dataset, tokenizer, source, options)
    cache.claim(folder)
    tokens = cache.tokens
    writer = _Writer(teacher, cache, folder, _Report(progress, 0, tokens))
    shards, done, skipped = cache.shards(folder), 0, 0
    for shard, first in zip(shards, range(0, len(numbers), cache.shard_rows), strict=True):
        rows = [np.asarray(dataset[i][IDS], dtype=np.int32) for i in numbers[first : first + cache.shard_rows]]
        if shard.is_file():
            skipped += 1
        else:
            writer.report.done = done
            replace_atomically(shard, partial(writer.write, rows))
        done += sum(map(len, rows))
        if progress is not None:
            progress(done, tokens)
    for draft in (*folder.glob(".data-*"), *folder.glob(".head.*")):  # of runs that were killed
        draft.unlink()
    head = folder / FILE
    return Written(
        folder,
        cache,
        sum(shard.stat().st_size for shard in shards),
        head.stat().st_size if head.is_file() else 0,
        time.perf_counter() - start,
        skipped,
    )


def _asked(teacher: Any) -> Teacher:
    """The teacher, all rows of its head: who reads the cache knows the student's."""
    return teacher.teacher if isinstance(teacher, PaddedTeacher) else teacher


def _plan(
    teacher: Teacher, dataset: Any, tokenizer: Any, source: str, options: dict[str, Any]
) -> tuple[Cache, list[int]]:
    """What the cache is to hold, and the numbers of the rows that have tokens."""
    layout = {name: options.pop(name, default) for name, default in (("shard_rows", 256), ("batch_rows", 8))}
    for name, value in layout.items():
        check_count(name, value, 1)
    if unknown := [name for name in options if name not in {field.name for field in fields(Form)}]:
        raise ValueError(f"write_cache does not take {unknown[0]!r}: see its documentation for the options")
    if options.get("kind", "top_k") == "top_k" and options.get("k") is None:
        options["k"] = getattr(teacher, "k", None)
    form = Form(**options)
    numbers, tokens, content = _scan(dataset)
    name = getattr(teacher, "name", type(teacher).__name__)
    name = Path(name).name if Path(name).is_dir() else name  # a path of this machine tells others nothing
    weights = fingerprint_model(inner_of(teacher.model)) if isinstance(teacher, LocalTeacher) else ""
    own = "" if tokenizer is None else fingerprint_tokenizer(tokenizer)
    return Cache(form, name, weights, own, source, content, len(numbers), tokens, **layout), numbers


@dataclass
class _Report:
    """Tells how many tokens are done."""

    progress: Progress | None
    done: int
    tokens: int

    def add(self, tokens: int) -> None:
        self.done += tokens
        if self.progress is not None:
            self.progress(self.done, self.tokens)


def _has_ids(dataset: Any) -> bool:
    return IDS in (getattr(dataset, "column_names", None) or ())


def _scan(dataset: Any) -> tuple[list[int], int, str]:
    """The numbers of rows that have tokens, the number of all tokens, and a hash of them."""
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"dataset is a {type(dataset).__name__}: pass a Dataset, not a stream")
    if not len(dataset) or IDS not in dataset[0]:
        found = ", ".join(dataset[0]) if len(dataset) else "no rows"
        raise ValueError(f"dataset has {found}: pass one with {IDS}, a document in each row")
    digest, numbers, tokens = blake2b(digest_size=16), list[int](), 0
    for i in range(len(dataset)):
        row = np.asarray(dataset[i][IDS], dtype="<i4")
        if len(row):
            digest.update(len(row).to_bytes(8, "little") + row.tobytes())
            numbers.append(i)
            tokens += len(row)
    if not numbers:
        raise ValueError("dataset has no tokens: pass one with documents")
    return numbers, tokens, digest.hexdigest()


@dataclass
class _Writer:
    """Writes files of a cache."""

    teacher: Teacher
    cache: Cache
    folder: Path
    report: _Report
    factors: np.ndarray | None = None

    def write(self, rows: Sequence[np.ndarray], draft: Path) -> None:
        """Write the documents of a file, the longest ones first, so that batches have little padding."""
        import pyarrow as pa

        form, writer = self.cache.form, None
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        with pa.OSFile(str(draft), "wb") as sink:
            for first in range(0, len(order), self.cache.batch_rows):
                chosen = [rows[i] for i in order[first : first + self.cache.batch_rows]]
                columns = self._columns(chosen)
                if writer is None:
                    width = next(x.shape[1] for name, x in columns.items() if form.columns[name][1])
                    schema = form.features(width).arrow_schema
                    writer = pa.ipc.new_stream(sink, schema)
                writer.write_batch(_record(schema, chosen, columns))
                self.report.add(sum(map(len, chosen)))
            assert writer is not None  # there are rows
            writer.close()

    def _columns(self, rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """The columns of documents, one after the other."""
        ids, mask = padded([row.tolist() for row in rows])
        found, form = self.teacher.targets({IDS: ids, "attention_mask": mask}), self.cache.form
        if form.kind == "top_k":
            return form.encoded({name: x.cpu().numpy() for name, x in _top_k(found, mask.bool(), form).items()})
        if not isinstance(found, tuple):
            raise ValueError(
                f"kind is 'hidden', but this teacher has none, only a {type(found).__name__}: choose kind='top_k'"
            )
        hidden = found[0][mask.bool()].float().cpu().numpy()
        if self.factors is None:
            self.factors = self._of_features(hidden, found[1])
        return form.encoded({"hidden": hidden}, self.factors)

    def _of_features(self, hidden: np.ndarray, head: Head) -> np.ndarray:
        """The factors of features, which the first batch decides; they are kept with the head."""
        file, stored = self.folder / FILE, self.cache.form.dtype == "int8"
        if not file.is_file():
            save_head(head, file, factors_of(hidden) if stored else None)
        factors = load_head(file)[1]
        return np.ones(1, np.float32) if factors is None else factors


def _top_k(found: Any, real: Tensor, form: Form) -> dict[str, Tensor]:
    """`ids`, `logp` and `rest` of all positions that are no padding."""
    assert form.k is not None
    if isinstance(found, tuple):
        hidden, head = found
        if form.k > head.vocabulary:
            raise ValueError(f"k is {form.k}, but the teacher has {head.vocabulary} tokens: choose fewer")
        top = top_k_of(hidden[real], head, form.k, temperature=form.temperature)
        return {"ids": top.ids, "logp": top.logp, "rest": top.rest}
    if not isinstance(found, TopK):
        raise ValueError(f"the teacher answers with a {type(found).__name__}: cache its parts one by one")
    if found.ids.shape[-1] != form.k or found.temperature != form.temperature:
        raise ValueError(
            f"k is {form.k} and temperature {form.temperature}, but the teacher has k = {found.ids.shape[-1]} and"
            f" temperature {found.temperature}: choose these"
        )
    rest = found.rest if found.mask is None else torch.where(found.mask, found.rest, torch.nan)
    return {"ids": found.ids[real], "logp": found.logp[real], "rest": rest[real]}


def _record(schema: Any, rows: Sequence[np.ndarray], columns: dict[str, np.ndarray]) -> Any:
    """Documents as a batch of Arrow's."""
    import pyarrow as pa

    offsets = pa.array(np.cumsum([0, *map(len, rows)]), pa.int32())
    arrays = []
    for field in schema:
        column = np.concatenate(rows) if field.name == IDS else columns[field.name]
        values = pa.array(column.reshape(-1))
        if column.ndim > 1:
            values = pa.FixedSizeListArray.from_arrays(values, column.shape[1])
        arrays.append(pa.ListArray.from_arrays(offsets, values).cast(field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)

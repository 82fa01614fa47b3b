"""A teacher that answered before: its targets are looked up by the tokens of each document of a batch.

So rows may be shuffled, padded, packed or cut off: a causal model's targets for a document's first tokens do not depend
on what follows. Not on what precedes, though: a document has to begin where it began when it was cached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..losses.targets import TAILS, TopK
from ..ops import Head, Payload
from . import cache
from .assembling import assembled
from .documents import Document, documents_of
from .forms import Form, remaining
from .heads import FILE, load_head
from .index import Index
from .local import moved

IDS = "input_ids"


class StoredTeacher:
    """Hidden states or most probable tokens out of a cache, or out of the columns of a data set.

    Args:
        dataset: A `datasets.Dataset` with `input_ids` and the columns of the form (`hf_xent.teachers.forms`).
        form: What its columns hold.
        head: The head of stored hidden states.
        tail: What is assumed about the tokens that are not stored, a name of `hf_xent.losses.targets.TAILS`.
        name: What it is called in messages.

    Raises:
        ValueError: A column or the head is missing, or the tail is unknown.
    """

    def __init__(
        self, dataset: Any, form: Form, head: Head | None = None, *, tail: str = "class", name: str = "the data set"
    ):
        if tail not in TAILS:
            raise ValueError(f"tail is {tail!r}: choose {', '.join(TAILS)}")
        if form.kind == "hidden" and head is None:
            raise ValueError(f"{name} has hidden states but no head: pass the teacher's, head=...")
        columns = [IDS, *form.columns]
        kept = [column for column in columns if column in dataset.column_names]
        if missing := sorted({*columns} - {*kept, "rest"}):
            raise ValueError(f"{name} has no column {missing[0]!r}, but {', '.join(dataset.column_names)}")
        self.form, self.head, self.tail, self.name = form, head, tail, name
        self.rows = dataset.select_columns(kept).with_format("arrow")
        self._index: Index | None = None

    @classmethod
    def from_folder(cls, folder: str | Path, *, tail: str = "class") -> StoredTeacher:
        """The teacher of a cache that `write_cache` wrote. Raises: ValueError for one that is not complete."""
        folder = Path(folder)
        form = cache.read(folder).form
        rows = cache.documents(folder)
        head = load_head(folder / FILE)[0] if form.kind == "hidden" else None
        return cls(rows, form, head, tail=tail, name=f"the cache {folder}")

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        head: Head | None = None,
        *,
        temperature: float = 1.0,
        tail: str = "class",
        name: str = "the data set",
    ) -> StoredTeacher:
        """A teacher of the columns of any data set, a row per document.

        Args:
            dataset: A `datasets.Dataset` with `input_ids` [n], and either `hidden` [n, D] (with `scale` [n] if it is
                int8) or `ids` and `logp` [n, k] (with `rest` [n]; it follows from logp if there is none).
            head: The head of the hidden states.
            temperature: T of the softmax that the log-probabilities are of.
            tail: As in the class.
            name: As in the class.

        Raises:
            ValueError: The data set has neither, or as in the class.
        """
        names = dataset.column_names
        if "hidden" in names:
            dtype = "int8" if "scale" in names else "float32"
            return cls(dataset, Form("hidden", dtype=dtype), head, tail=tail, name=name)
        if not {IDS, "ids", "logp"} <= {*names}:
            raise ValueError(
                f"{name} has the columns {', '.join(names)}: a teacher needs input_ids, and hidden or ids and logp"
            )
        row = dataset.select([0])
        k = len(row["ids"][0][0])
        return cls(row if row is dataset else dataset, Form("top_k", k, "float32", temperature), tail=tail, name=name)

    @property
    def index(self) -> Index:
        """Where each document is; made of all tokens when it is first asked for."""
        if self._index is None:
            self._index = Index(self._all_tokens(), self._tokens)
        return self._index

    def targets(self, batch: Mapping[str, Any]) -> Payload | TopK:
        """What the teacher said about the documents of a batch.

        Args:
            batch: The student's inputs; with `labels`, documents without any are not looked up.

        Raises:
            ValueError: A document is not stored; or there are no hidden states for a position with a label.
        """
        shape, form = tuple(batch[IDS].shape), self.form
        width = form.k if self.head is None else self.head.features
        arrays = {
            name: np.zeros((*shape, width) if wide else shape, np.float32 if dtype == "int8" else dtype)
            for name, (dtype, wide) in form.columns.items()
            if name != "scale"
        }
        if "rest" in arrays:
            arrays["rest"][:] = np.nan
        known = np.zeros(shape, dtype=bool)
        for document in documents_of(batch):
            for name, x in self._values(document).items():
                arrays[name][document.row, document.columns] = x
            known[document.row, document.columns] = True
        device = batch[IDS].device
        if self.head is not None:
            _refuse_unknown(known, batch.get("labels"))
            head = self.head = moved(self.head, device)
            return torch.from_numpy(arrays["hidden"]).to(device).to(head.weight.dtype), head
        return assembled(arrays, device, self.tail, form.temperature)

    def _values(self, document: Document) -> dict[str, np.ndarray]:
        """The stored values of a document, [n, ...] each."""
        number = self.index.find(document.ids)
        length = len(document.ids)
        if number is None:
            shown = ", ".join(map(str, document.ids[:8])) + (", ..." if length > 8 else "")
            raise ValueError(
                f"{self.name} has no document that begins with the {length} tokens [{shown}] of row {document.row} of"
                " the batch: cache the data with the same tokenizer, chat template and max_length"
            )
        table = self.rows[number : number + 1]
        tokens = len(_flat(table, IDS))
        columns = {}
        for name in table.column_names:
            flat = _flat(table, name)
            if tokens == 0 or len(flat) % tokens:
                raise ValueError(f"{self.name} has {len(flat)} numbers in {name!r} of row {number}, of {tokens} tokens")
            wide = name in self.form.columns and self.form.columns[name][1]
            columns[name] = flat.reshape(tokens, -1)[:length] if wide else flat[:length]
        del columns[IDS]
        if "rest" in self.form.columns and "rest" not in columns:
            columns["rest"] = remaining(columns["logp"])
        return self.form.decoded(columns)

    def _tokens(self, number: int) -> np.ndarray:
        return _flat(self.rows[number : number + 1], IDS)

    def _all_tokens(self) -> Iterator[np.ndarray]:
        for table in self.rows.select_columns([IDS]).iter(1000):
            column = table.column(IDS).combine_chunks()
            tokens, offsets = column.values.to_numpy(), column.offsets.to_numpy()
            yield from map(tokens.__getitem__, map(slice, offsets[:-1], offsets[1:]))


def _flat(table: Any, name: str) -> np.ndarray:
    """All numbers of a column of one row, of lists of any depth."""
    values = table.column(name).chunk(0)
    while hasattr(values, "storage") or hasattr(values, "flatten"):
        if hasattr(values, "storage"):
            values = values.storage  # of the array types of `datasets`
        elif hasattr(values.type, "value_type"):
            values = values.flatten()
        else:
            break
    found: np.ndarray = values.to_numpy(zero_copy_only=False)
    return found


def _refuse_unknown(known: np.ndarray, labels: Tensor | None) -> None:
    """Raises: ValueError for a label whose prediction has no hidden states: that behind padding on the left."""
    if labels is None:
        return
    bare = (labels.cpu().numpy()[:, 1:] != -100) & ~known[:, :-1]
    if bare.any():
        row, column = np.argwhere(bare)[0]
        raise ValueError(
            f"labels has one at row {row}, position {column + 1}, that only padding precedes: set it to -100, or cache"
            " the most probable tokens (kind top_k)"
        )

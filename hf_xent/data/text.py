"""Text from any source, and its blocks of tokens: `load_text` (registry, local files, Hub) and `pack`.

source -> Dataset with a text column -> tokens of every row + EOS, joined -> blocks of block_size tokens
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .corpus import Source, split_of_train
from .files import BUILDERS, expanded_path, files_of, first_line, inferred_type, suffix_of, table
from .registered import DATASETS

TEXT = ("string", "large_string", "string_view")
"""The names of string types in `datasets`."""

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class Opened(NamedTuple):
    """A source of text whose rows are not read yet."""

    content: str
    """A fingerprint of the content."""
    rows: Callable[[], Any]
    """Returns the dataset, checked."""


def load_text(source: str | Path, split: str | None = None, column: str = "text", *, chats: bool = False) -> Dataset:
    """A dataset with a column of text, from a name in DATASETS, a local file, a folder of files, or a Hub dataset id.

    A .txt file is one row; .jsonl, .json, .csv, .tsv and .parquet files are rows with columns; a folder is searched for
    files of one of these kinds, in the order of their paths. All but Parquet may be compressed (.gz, .bz2, .xz). Cells
    of .csv and .tsv files are read as text. A folder of `Dataset.save_to_disk` is read too.

    Args:
        source: The name, path or Hub id; a name or an id may have a configuration, 'wikitext:wikitext-2-v1'.
        split: As for `datasets`, 'train' or 'train[:1%]'; None for 'train', or for the only split.
        column: The column that has to hold text.
        chats: Whether it may hold chats, too: lists of messages, which have 'role' and 'content'.

    Returns:
        A `datasets.Dataset`.

    Raises:
        ValueError: For a source that is none of these, or that has no rows, no `column`, or no text in it.
    """
    return opened(source, split, column, chats=chats).rows()


def opened(source: str | Path, split: str | None = None, column: str = "text", *, chats: bool = False) -> Opened:
    """Opens a source without reading its rows; arguments and errors are those of `load_text`."""
    raw, dataset = _found(source, split, column)
    source = str(source)

    def rows() -> Dataset:
        checked = _checked(dataset(), column, source, chats)
        if not any(text and (not isinstance(text, str) or text.strip()) for text in checked[column]):
            raise ValueError(f"{source} has only empty texts in its column {column!r}: choose another")
        return checked

    return Opened(raw._fingerprint, rows)  # datasets has no public name for it


def load_rows(source: str | Path, split: str | None = None) -> Dataset:
    """All columns of a source of `load_text`, whatever they hold; cells of .csv and .tsv files are text.

    Raises:
        ValueError: For a source that is none of these, or that has no rows.
    """
    rows = _found(source, split)[1]()
    if not len(rows):
        raise ValueError(f"{source} has no rows: choose another split or source")
    return rows


def pack(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int, column: str = "text") -> Dataset:
    """Packs text into blocks of `block_size` tokens with `input_ids` and `labels` (equal; models shift labels).

    Rows are tokenized with the tokenizer's defaults (with a BOS if the model was trained with one), terminated by EOS
    and joined in order; blocks cross the boundaries of rows. The tokens after the last full block are dropped, unless
    there is no full block: then they form a single shorter block. There is no padding.

    Args:
        dataset: A dataset with a column of text, not a stream.
        tokenizer: A tokenizer with an EOS token.
        block_size: Number of tokens in a block, at least 2.
        column: The column that holds the text.

    Returns:
        A dataset of blocks.

    Raises:
        ValueError: For a missing column, a tokenizer without EOS, block_size < 2, or fewer than 2 tokens in all.
    """
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"dataset is a {type(dataset).__name__}: pass a Dataset, not a stream")
    if block_size < 2:
        raise ValueError(f"block_size is {block_size}: a block needs 2 tokens, one to read and one to predict")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token to join rows with: set tokenizer.eos_token")
    _checked(dataset, column, "dataset")
    eos = tokenizer.eos_token_id
    carried: list[int] = []

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        rows = tokenizer([text or "" for text in batch[column]], verbose=False)["input_ids"]
        return {"input_ids": [row if row[-1:] == [eos] else [*row, eos] for row in rows]}

    def cut(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        tokens = [*carried, *chain.from_iterable(batch["input_ids"])]
        end = len(tokens) // block_size * block_size
        carried[:] = tokens[end:]  # for the next batch, so that no token is lost between batches
        blocks = [tokens[i : i + block_size] for i in range(0, end, block_size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    rows = dataset.map(tokenize, batched=True, remove_columns=dataset.column_names, desc="tokenize")
    # `cut` carries tokens from batch to batch, and a cached result would leave `carried` empty
    blocks = rows.map(cut, batched=True, load_from_cache_file=False, desc="pack")
    if len(blocks):
        return blocks
    if len(carried) < 2:
        raise ValueError(f"dataset has {len(carried)} tokens in total: pass one with at least 2")
    return type(dataset).from_dict({"input_ids": [carried], "labels": [list(carried)]})


def _found(source: str | Path, split: str | None, column: str | None = None) -> tuple[Dataset, Callable[[], Dataset]]:
    """The rows of a source as they are there, and a function that gives them as they are used."""
    if not isinstance(source, (str, os.PathLike)) or not str(source).strip():
        raise ValueError(f"source is {source!r}: pass one name, path or Hub id")
    source, path = str(source), expanded_path(source)
    key, _, config = source.partition(":")
    if key in DATASETS:
        corpus, copy = DATASETS[key], Source(config=config)
        published = _only(corpus.read(copy, split), source)
        return published, lambda: corpus.unify(published, copy, split or "train")
    if os.path.exists(path):
        rows = _local(path, split, column)
    elif suffix_of(path) in BUILDERS:
        raise ValueError(f"no file {source}: give the path of an existing file or folder")
    else:
        rows = _hub(source, split)
    return rows, lambda: rows


def _checked(dataset: Dataset, column: str, source: str, chats: bool = False) -> Dataset:
    if column not in dataset.column_names:
        raise ValueError(f"{source} has no column {column!r}: choose one of {', '.join(dataset.column_names)}")
    if not len(dataset):
        raise ValueError(f"{source} has no rows: choose another split or source")
    feature = dataset.features[column]
    if is_text(feature) or (chats and {"role", "content"} <= {*(getattr(feature, "feature", None) or ())}):
        return dataset
    raise _not_text(column, source, str(getattr(feature, "dtype", None) or feature))


def is_text(feature: Any) -> bool:
    """Whether a column of this feature holds text."""
    return getattr(feature, "dtype", None) in TEXT  # a list has no dtype


def _not_text(column: str, source: str, type_name: str) -> ValueError:
    type_name = " ".join(type_name.split())
    return ValueError(f"{source} holds {type_name}, not text, in its column {column!r}: choose another or convert it")


def _local(path: Path, split: str | None, column: str | None) -> Dataset:
    kind, files = files_of(path)
    try:
        rows = split_of_train(table(kind, files), split or "train", streaming=False)
    except Exception as error:  # `datasets` raises many types of them
        raise ValueError(f"cannot read {path} (split {split or 'train'}): {first_line(error)}") from error
    if kind == "csv" and column is not None and column in rows.column_names and (type_ := inferred_type(rows[column])):
        raise _not_text(column, str(path), type_)
    return rows


def _hub(source: str, split: str | None) -> Dataset:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        splits = load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:  # every error of the Hub and of `datasets` is one of these
        raise ValueError(
            f"{source!r} is neither a registered dataset ({DATASETS.names()}) nor a local path, and as a Hub dataset"
            f" it does not load: {first_line(error)}"
        ) from error
    return _only(splits, source)


def _only(splits: Any, source: str) -> Dataset:
    """The default split: 'train', or the only one. A single dataset is returned unchanged."""
    if not isinstance(splits, dict):
        return splits
    if "train" not in splits and len(splits) > 1:
        raise ValueError(f"{source} has no split 'train': choose one of {', '.join(splits)}")
    return splits["train"] if "train" in splits else next(iter(splits.values()))

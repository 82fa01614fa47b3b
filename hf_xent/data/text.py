"""Text from anywhere, and its blocks of tokens: `load_text` (registry, local files, Hub) and `pack`.

source -> Dataset with a text column -> tokens of every row + EOS, end to end -> blocks of block_size tokens
"""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import BUILDERS, first_line, readable

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def load_text(source: str, split: str | None = None, column: str = "text") -> Dataset:
    """A dataset with a column of text, from a name in DATASETS, a local file, a folder of files, or a Hub dataset id.

    A .txt file is one row; .jsonl, .json, .csv and .parquet files are rows with columns; a folder is searched for files
    of one of these kinds, in the order of their paths. A Hub id may name its configuration: 'wikitext:wikitext-2-v1'.
    `split` as `datasets` takes it ('train', 'train[:1%]'); by default 'train', or the only one there is.

    Raises: ValueError for a source that is none of these, without rows, or without `column`.
    """
    from . import DATASETS, load  # late: the registry's module imports this one

    path = Path(source).expanduser()
    if source.partition(":")[0] in DATASETS:
        dataset = _only(load(source, split=split), source)
    elif path.exists():
        dataset = _local(path, split)
    elif path.suffix in BUILDERS:
        raise ValueError(f"no file {source}: give the path of an existing file or folder")
    else:
        dataset = _hub(source, split, known=", ".join(DATASETS))
    return _checked(dataset, column, source)


def pack(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, block_size: int, column: str = "text") -> Dataset:
    """Blocks of `block_size` tokens with `input_ids` and `labels` (equal; models shift labels themselves).

    Rows are tokenized as the tokenizer does by default (a BOS where the model was trained with one), ended by EOS and
    joined in order; blocks run across rows. The tokens after the last full block are dropped, unless there is no full
    block: then they are the only, shorter block. Nothing is padded.

    Raises: ValueError for a missing column, a tokenizer without EOS, block_size < 2, or fewer than 2 tokens in all.
    """
    if block_size < 2:
        raise ValueError(f"block_size is {block_size}: a block needs 2 tokens, one to read and one to predict")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token to join rows with: set tokenizer.eos_token")
    _checked(dataset, column, "dataset")
    eos = tokenizer.eos_token_id
    rest: list[int] = []

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        rows = tokenizer([text or "" for text in batch[column]], verbose=False)["input_ids"]
        return {"input_ids": [row if row[-1:] == [eos] else [*row, eos] for row in rows]}

    def cut(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        tokens = [*rest, *chain.from_iterable(batch["input_ids"])]
        end = len(tokens) // block_size * block_size
        rest[:] = tokens[end:]  # carried into the next batch: no token is lost where batches meet
        blocks = [tokens[i : i + block_size] for i in range(0, end, block_size)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    rows = dataset.map(tokenize, batched=True, remove_columns=dataset.column_names, desc="tokenize")
    # `cut` carries tokens from batch to batch, so a cached result would come without its rest
    blocks = rows.map(cut, batched=True, load_from_cache_file=False, desc="pack")
    if len(blocks):
        return blocks
    if len(rest) < 2:
        raise ValueError(f"the dataset has {len(rest)} tokens in all: at least 2 are needed")
    return type(dataset).from_dict({"input_ids": [rest], "labels": [list(rest)]})


def _checked(dataset: Dataset, column: str, source: str) -> Dataset:
    if column not in dataset.column_names:
        raise ValueError(f"{source} has no column {column!r}: choose one of {', '.join(dataset.column_names)}")
    if not len(dataset):
        raise ValueError(f"{source} has no rows: choose another split or source")
    return dataset


def _local(path: Path, split: str | None) -> Dataset:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    kind, files = readable(path)
    options = {"sample_by": "document"} if kind == "text" else {}
    try:
        return load_dataset(kind, data_files=[str(file) for file in files], split=split or "train", **options)
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(f"cannot read {path} (split {split or 'train'}): {first_line(error)}") from error


def _hub(source: str, split: str | None, known: str) -> Dataset:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        found = load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:  # every error of the Hub and of `datasets` is one of these
        raise ValueError(
            f"{source!r} is no registered dataset ({known}) and no local path, and as a Hub dataset"
            f" it does not load: {first_line(error)}"
        ) from error
    return _only(found, source)


def _only(found: Any, source: str) -> Dataset:
    """The split meant where none was named."""
    if not isinstance(found, dict):
        return found
    if "train" not in found and len(found) > 1:
        raise ValueError(f"{source} has no split 'train': choose one of {', '.join(found)}")
    return found["train"] if "train" in found else next(iter(found.values()))

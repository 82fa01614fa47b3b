"""'mimir:CONFIG': members and non-members of the Pile, from the same distribution, decontaminated by n-gram overlap.

Configurations: arxiv, dm_mathematics, github, hackernews, pile_cc, pubmed_central, 'wikipedia_(en)' with the splits
ngram_7_0.2, ngram_13_0.2, ngram_13_0.8; c4, full_pile, temporal_wiki with the split none; temporal_arxiv with a month
such as 2020_08. Members come first, then non-members; no row is dropped, so their numbers can differ (github has 1000
and 740). The lower the allowed overlap, the more the two differ in distribution too.

The published loading script no longer runs, so its files are read: one JSON string per line, members in train/.
`path` is a folder with train/ and test/ somewhere below. On the Hub the dataset is gated.

Source: Duan et al. 2024, Do Membership Inference Attacks Work on Large Language Models?, arXiv:2402.07841; Hub
iamgroot42/mimir.
Data: text, label, source (the configuration), length.
"""

from __future__ import annotations

import json
from glob import escape
from typing import Any

from .corpus import Corpus, Source, member

NGRAMS = ("ngram_7_0.2", "ngram_13_0.2", "ngram_13_0.8")
WHOLE = ("c4", "full_pile", "temporal_wiki")
SIDES = {"train": 1, "test": 0}
"""Folder -> label."""


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return member(json.loads(row["text"]), row["label"], row["source"])


class Mimir(Corpus):
    """A split is two files of strings, one for members and one for non-members."""

    def open(self, source: Source, split: str | None) -> Any:
        """The rows of members, then those of non-members."""
        from datasets import DatasetDict, IterableDatasetDict

        if not source.config:
            raise ValueError("name a configuration: 'mimir:arxiv', 'mimir:github', ...")
        if split is not None:
            return self._split(source, split)
        splits = ("none",) if source.config in WHOLE else NGRAMS
        dict_class = IterableDatasetDict if source.streaming else DatasetDict
        return dict_class({name: self._split(source, name) for name in splits})

    def _split(self, source: Source, split: str) -> Any:
        from datasets import concatenate_datasets

        stem = source.config if split == "none" else f"{source.config}_{split}"
        return concatenate_datasets([self._side(source, side, f"{side}/{stem}.jsonl") for side in SIDES])

    def _side(self, source: Source, side: str, name: str) -> Any:
        from datasets import load_dataset

        file = f"hf://datasets/{self.repo}@{source.revision or 'main'}/{_folder(source)}/{name}"
        if source.path is not None:
            local = source.path / name
            files = (f for f in source.path.rglob("*.jsonl") if (f.parent.name, f.name) == (side, local.name))
            file = escape(str(next(files, local)))  # `datasets` would read it as a pattern
        options = {"encoding": "utf-8-sig", "split": "train", "streaming": source.streaming}
        rows = load_dataset("text", data_files=file, **options)
        columns = {"label": SIDES[side], "source": source.config}
        return rows.map(lambda row: {**row, **columns})


def _folder(source: Source) -> str:
    return "cache_100_200_10000_512" if source.config == "full_pile" else "cache_100_200_1000_512"


CORPUS = Mimir(
    title="MIMIR",
    family="membership",
    license="other",
    caveat="Gated on the Hub, and drawn from the Pile, whose texts belong to many: do not pass rows on.",
    source="https://huggingface.co/datasets/iamgroot42/mimir",
    row=_row,
    columns=("text", "label", "source"),
    splits=dict.fromkeys((*NGRAMS, "none")),
    repo="iamgroot42/mimir",
    configured=True,
)

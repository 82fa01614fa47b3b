"""Models that are pre-trained from nothing on one half of a corpus, and the scores of texts of both halves.

Documents are cut into pieces of some characters. Some pieces are kept for the frequencies of tokens; the others are
drawn at random into two sides, A and B. A seed 2 k trains on side A of pair k, and 2 k + 1 on side B, so each of the
two models has never seen what the other was trained on. A side has

    1x              pieces that are read once, at random positions of the run
    2x ... 16x      pieces that are read so many times
    the rest        read once, not scored

All is kept in the work folder: tokenizer, checkpoints, models, scores. What is there is not made again.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_xent
from benchmarks.studies.base import new_model, train_tokenizer
from benchmarks.studies.plan import Job
from hf_xent import data, detection
from hf_xent.detection.counts import count, smoothed
from hf_xent.detection.scorer import Batch, lazy
from hf_xent.system.files import replace_atomically

DOSES = (1, 2, 4, 8, 16)
ONCE, REPEATED, KEPT = 2000, 160, 0.1  # pieces that are read once and scored; of each other dose; share for the table
PIECES = 10_000  # that a model reads, repetitions included
TOKENS, ROWS, RATE, VOCABULARY = 127, 4, 1e-3, 8192  # of a piece at most, beside the start token; pieces in a step
SIZE = {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 128}
CAPS = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)
TABLES = ("kept", "other")
LOWERED = "lowercase"


@dataclass(frozen=True)
class Corpus:
    """Where texts come from.

    Args:
        name: Of the plan and of the work folder.
        sources: Folders of the text folder.
        characters: The length of a piece, about 128 tokens.
        other: Folders with the texts of the second table of frequencies.
        spaced: Whether words are apart, so that pieces end between words.
    """

    name: str
    sources: tuple[str, ...]
    characters: int
    other: tuple[str, ...]
    spaced: bool

    def documents(self, job: Job, sources: tuple[str, ...]) -> list[tuple[str, str]]:
        """(source, text) of every document."""
        if job.tiny:
            draw = random.Random(len(sources))
            words = [f"{a}{b}" for a in ("ba", "co", "di", "fu") for b in ("ra", "se", "ti", "no")]
            return [(source, " ".join(draw.choices(words, k=900))) for source in sources]
        if sources == ("pydoc",):  # the table that the package counts by default
            return [("pydoc", row["text"]) for row in data.load_text("pydoc")]
        files = [(source, file) for source in sources for file in sorted((job.text / source).glob("*.txt"))]
        if missing := [source for source in sources if source not in {found for found, _ in files}]:
            raise ValueError(f"{job.text} has no texts in {missing}: run benchmarks.studies.corpora and .chinese")
        return [(source, file.read_text(encoding="utf-8")) for source, file in files]

    def pieces(self, job: Job) -> list[tuple[str, str]]:
        """(source, piece) of all documents, without repeated pieces and the short ends of documents."""
        length = 40 if job.tiny else self.characters
        found: dict[str, str] = {}
        for source, text in self.documents(job, self.sources):
            for piece in cut(text, length, self.spaced):
                found.setdefault(piece, source)
        return [(source, piece) for piece, source in found.items()]


def cut(text: str, length: int, spaced: bool) -> list[str]:
    """Pieces of `length` characters at least, or exactly where words are not apart; what is left over is dropped."""
    if not spaced:
        return [text[i : i + length] for i in range(0, len(text) - length + 1, length)]
    pieces, words, size = [], [], 0
    for word in text.split():
        words.append(word)
        size += len(word) + 1
        if size > length:
            pieces.append(" ".join(words))
            words, size = [], 0
    return pieces


@dataclass(frozen=True)
class Pair:
    """The two sides of a pair: side -> dose -> (source, piece); dose 0 is the rest, read once and not scored."""

    sides: tuple[dict[int, list[tuple[str, str]]], dict[int, list[tuple[str, str]]]]
    kept: list[str]

    def scored(self) -> list[tuple[int, int, str, str]]:
        """(side, dose, source, piece) of what is scored, under both models in the same order."""
        return [(side, dose, *row) for side in (0, 1) for dose in DOSES for row in self.sides[side][dose]]

    def order(self, side: int, seed: int) -> list[tuple[int, int, str]]:
        """(dose, index, piece) as they are read by the model of a side."""
        rows = [
            (dose, i, piece)
            for dose, pieces in self.sides[side].items()
            for i, (_, piece) in enumerate(pieces)
            for _ in range(max(1, dose))
        ]
        return random.Random(seed).sample(rows, len(rows))


class Experiment:
    """The models and scores of a corpus."""

    def __init__(self, corpus: Corpus, job: Job):
        self.corpus, self.job = corpus, job
        self.once, self.repeated = (24, 3) if job.tiny else (job.scaled(ONCE), job.scaled(REPEATED))
        self.rows = 126 if job.tiny else job.scaled(PIECES)
        self.folder = job.work / f"{corpus.name}-{self.rows}-{job.device}"
        self._pairs: dict[int, Pair] = {}

    @cached_property
    def pieces(self) -> list[tuple[str, str]]:
        """All pieces, in one order for all seeds."""
        found = self.corpus.pieces(self.job)
        return random.Random(0).sample(found, len(found))

    def pair(self, seed: int) -> Pair:
        """The sides of a seed's pair. Raises: ValueError if there are too few pieces."""
        first, number = round(KEPT * len(self.pieces)), seed // 2
        if number not in self._pairs:
            rest = random.Random(1 + number).sample(self.pieces[first:], len(self.pieces) - first)
            half = len(rest) // 2
            sides = self._side(rest[:half]), self._side(rest[half:])
            self._pairs[number] = Pair(sides, [piece for _, piece in self.pieces[:first]])
        return self._pairs[number]

    def _side(self, pieces: list[tuple[str, str]]) -> dict[int, list[tuple[str, str]]]:
        counts = {1: self.once, **dict.fromkeys(DOSES[1:], self.repeated)}
        counts[0] = self.rows - sum(dose * number for dose, number in counts.items())
        if sum(counts.values()) > len(pieces):
            raise ValueError(f"{self.corpus.name} has {len(pieces)} pieces for a side: choose a smaller budget")
        ends = np.cumsum(list(counts.values()))
        return {dose: pieces[end - counts[dose] : end] for dose, end in zip(counts, ends.tolist(), strict=True)}

    def tokenizer(self) -> Any:
        """The tokenizer, which was trained on pieces of both sides alike."""
        folder = self.folder / "tokenizer"
        if not folder.exists():
            made = train_tokenizer([piece for _, piece in self.pieces[::4]], 280 if self.job.tiny else VOCABULARY)
            made.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)

    def model(self, seed: int) -> Any:
        """The model of a seed; its training goes on where it stopped."""
        folder = self.folder / f"model-{seed}"
        if not (folder / "config.json").exists():
            tokenizer, pair = self.tokenizer(), self.pair(seed)
            order = [piece for _, _, piece in pair.order(seed % 2, seed)]
            model = pretrained(order, tokenizer, seed, self.folder / f"checkpoints-{seed}", self.job)
            model.save_pretrained(folder)
            shutil.rmtree(self.folder / f"checkpoints-{seed}", ignore_errors=True)
        return AutoModelForCausalLM.from_pretrained(folder)

    def scores(self, seed: int) -> dict[str, np.ndarray]:
        """Score -> its values of `Pair.scored` under the model of a seed, larger for a member."""
        file = self.folder / f"scores-{seed}.npz"
        if not file.exists():
            tokenizer, pair = self.tokenizer(), self.pair(seed)
            model = self.model(seed)
            others = [text for _, text in self.corpus.documents(self.job, self.corpus.other)]
            q = {
                name: smoothed(count(texts, tokenizer, len(tokenizer), 10**9))
                for name, texts in zip(TABLES, (pair.kept, others), strict=True)
            }
            texts = [piece for *_, piece in pair.scored()]
            found = scored(model.to(self.job.device), tokenizer, texts, q, lowered=self.corpus.spaced)

            def write(draft: Path) -> None:
                with draft.open("wb") as stream:
                    np.savez(stream, **found)

            replace_atomically(file, write)
        return dict(np.load(file))


def pretrained(texts: list[str], tokenizer: Any, seed: int, output: Path, job: Job) -> Any:
    """A new model that has read the texts in this order, once."""
    rows = Dataset.from_dict({"input_ids": [ids for _, ids in reader(tokenizer).tokenize(texts)]})
    set_seed(seed)
    size = SIZE if not job.tiny else {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 128}
    model = new_model(tokenizer, **size)
    config = hf_xent.XentConfig(
        output_dir=str(output), num_train_epochs=1, per_device_train_batch_size=ROWS, learning_rate=RATE, seed=seed,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1}, warmup_steps=100,
        weight_decay=0.1, adam_beta2=0.95, bf16=not job.tiny, use_cpu=job.device == "cpu", report_to="none",
        train_sampling_strategy="sequential", save_steps=500, save_total_limit=1, logging_steps=100,
    )  # fmt: skip
    trainer = hf_xent.XentTrainer(model, config, train_dataset=rows, data_collator=collated)
    output.mkdir(parents=True, exist_ok=True)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output)))
    return hf_xent.unpatch(model)


def collated(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of ids, padded on the right; what is padded is no label."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [-100] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids.clamp(min=0), "labels": ids}


def reader(tokenizer: Any, model: Any = None, scores: tuple[str, ...] = ("loss",), **options: Any) -> Any:
    """How a piece is read, in training and in scoring: after the start token, cut at TOKENS tokens."""
    model = model if model is not None else new_model(tokenizer, n_layer=1, n_embd=8, n_head=1)
    return detection.TextScorer(model, tokenizer, scores, max_tokens=TOKENS, batch_size=32, progress=False, **options)


def scored(
    model: Any, tokenizer: Any, texts: list[str], q: dict[str, torch.Tensor], lowered: bool
) -> dict[str, np.ndarray]:
    """Every score of every text, larger for a member; DC-PDD with all caps and both tables in one pass."""
    names = ("loss", "zlib", "min_k", "min_k_pp", "fast_detect", *((LOWERED,) if lowered else ()))
    capped = tuple(detection.sweep("dc_pdd", a=CAPS))
    scorer = reader(tokenizer, model, (*names, *capped), frequencies=next(iter(q.values())))
    rows = scorer.tokenize(texts)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][1]))
    values = {name: np.full(len(rows), np.nan) for name in (*names, *(f"{c} {t}" for c in capped for t in q))}
    fast = torch.autocast(torch.device(model.device).type, torch.bfloat16)
    with lazy(model), fast:
        for start in range(0, len(rows), scorer.batch_size):
            indices = order[start : start + scorer.batch_size]
            batch = Batch(scorer, [rows[i] for i in indices])
            for name in names:
                needed = {need: getattr(batch, need) for need in scorer.parsed[name].needs}
                values[name][indices] = scorer.parsed[name](batch.stats, **needed).numpy()
            for name in capped:
                for table, frequencies in q.items():
                    found = scorer.parsed[name](batch.stats, frequencies=frequencies)
                    values[f"{name} {table}"][indices] = found.numpy()
    return {name: detection.get(name.partition(" ")[0]).oriented(found) for name, found in values.items()}

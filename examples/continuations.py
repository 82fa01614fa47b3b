"""Continuations of paragraphs by SmolLM2 and by their authors, of equal numbers of tokens; made once and kept on disk.

    texts = Continuations(Path("out/texts"), ["pydoc", "readme"])
    machine, people = texts("pydoc", first=0, count=40)          # of the first 40 paragraphs; 4 authors' texts for each

A text has the NEW tokens after the first PROMPT tokens of a paragraph. A domain is a source for
`hf_xent.data.load_text` ('pydoc', 'wiki', 'brown:FOLDER', a file or folder), or 'readme': the descriptions of the
installed Python packages.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from hf_xent import data
from hf_xent.generation import sampling
from hf_xent.models import loading

PROMPT, NEW, BATCH, PER_MACHINE = 24, 48, 50, 4


def pages(domain: str) -> Iterable[str]:
    if domain == "readme":
        return [package.read_text("METADATA") or "" for package in distributions()]
    rows = data.load_text(domain)
    return rows["prose" if "prose" in rows.column_names else "text"]


def paragraphs(domain: str, tokenizer: Any) -> list[tuple[int, ...]]:
    """The first PROMPT + NEW tokens of every long paragraph of prose, shuffled once."""
    unique = {}
    for text in pages(domain):
        for block in (" ".join(block.split()) for block in re.split(r"\n\s*\n", text)):
            prose = sum(c.isalpha() or c == " " for c in block) > 0.9 * len(block)
            if len(block) > 3 * (PROMPT + NEW) and block[0].isalpha() and prose:
                ids = tokenizer(block)["input_ids"][: PROMPT + NEW]
                unique |= {tuple(ids): None} if len(ids) == PROMPT + NEW else {}
    random.Random(0).shuffle(shuffled := list(unique))
    return shuffled


def generated(model: Any, prompts: list[tuple[int, ...]], temperature: float, file: Path) -> list[list[int]]:
    """A continuation of each prompt, saved in a file batch by batch; those that ended early are left out."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    for start in track(range(len(file.read_text().splitlines()), len(prompts), BATCH), description=file.stem):
        ids = torch.tensor(prompts[start : start + BATCH])[:, :PROMPT]
        rows = sampling.sample(model, ids, tokens=NEW, seed=start, temperature=temperature)
        with file.open("a") as out:
            out.write("".join(json.dumps(row) + "\n" for row in rows))
    return [row for row in map(json.loads, file.read_text().splitlines()[: len(prompts)]) if len(row) == NEW]


class Continuations:
    """See the module's docstring."""

    def __init__(self, folder: Path, domains: Iterable[str]):
        self.folder = folder
        self.model, self.tokenizer = loading.load("smollm2")
        self.pool = {domain: paragraphs(domain, self.tokenizer) for domain in domains}

    def __call__(self, domain: str, first: int, count: int, temperature: float = 1.0) -> tuple[list[str], list[str]]:
        """The model's texts after `count` paragraphs of a domain, and PER_MACHINE authors' for each of them."""
        name = re.sub(r"\W+", "-", domain)
        file = self.folder / f"{name}-{temperature}.jsonl"
        machine = generated(self.model, self.pool[domain][first : first + count], temperature, file)
        people = [ids[PROMPT:] for ids in self.pool[domain][: PER_MACHINE * len(machine)]]
        return self._decoded(machine), self._decoded(people)

    def _decoded(self, tokens: Iterable[Any]) -> list[str]:
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(list(tokens))]

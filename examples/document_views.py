"""Features of documents, of copies of them without a third of their words, and of the names of their topics.

    found = read(encoder, seed, 1500, folder)     weak [N, D], strong [2, N, D], labels, names [C, D], others, known

Documents are those of a seed (topics.py), cut after 64 tokens; `others` are 1,000 more for what needs labels, the same
under every seed, with the labels `known`. Names are the mean over three texts, not of unit length. As the encoder is
frozen, all is read once and kept in files.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from topics import topics
from transformers import AutoModel, AutoTokenizer

from hf_xent.models import loading
from hf_xent.models.embeddings import class_texts, encoded
from hf_xent.system.files import replace_atomically

DROPPED, LENGTH, OTHERS, VIEWS = 1 / 3, 64, 1000, 2
FORMS = ("{}", "This text is about {}.", "An encyclopedia article on {}.")


def shortened(text: str, draw: random.Random) -> str:
    """The text without a third of its words."""
    return " ".join(word for word in text.split() if draw.random() > DROPPED) or text


def kept(file: Path, make: Any) -> dict[str, Any]:
    """What `make()` returned when it was called first."""
    if not file.exists():
        made = make()
        replace_atomically(file, lambda draft: torch.save(made, draft))
    return torch.load(file)


def read(encoder: str, seed: int, count: int, folder: Path) -> dict[str, Any]:
    """The features of one seed; see the module's docstring."""
    path = loading.resolve(encoder)
    model, tokenizer = AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    def features(texts: list[str]) -> torch.Tensor:
        return encoded(model, tokenizer, texts, batch_size=32, max_length=LENGTH, progress=True)

    def others() -> dict[str, Any]:
        texts, labels, names = topics(0, OTHERS, held=True)
        words = class_texts(model, tokenizer, names, FORMS, normalize=False)
        return {"others": features(texts), "known": labels, "names": words}

    def own() -> dict[str, Any]:
        (texts, labels, _), draw = topics(seed, count), random.Random(seed)
        views = [features([shortened(text, draw) for text in texts]) for _ in range(VIEWS)]
        return {"weak": features(texts), "strong": torch.stack(views), "labels": labels}

    return kept(folder / "others.pt", others) | kept(folder / f"documents-{seed}.pt", own)

"""Pre-training of the models of tag_models.py for downstream_law.py: running text is restored, piece by piece.

A piece is 12 words of the Brown corpus, of which 30 % are hidden in what the encoder reads; each is read once, and the
weights are kept after some steps of one run at a constant learning rate. In random order, the words of a piece are
shuffled, in what is read and in what is restored alike: which word stands where is still learned, but no grammar.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tag_models
from transformers import TrainerCallback
from word_tags import UNKNOWN, Row

PIECE, HIDDEN, WIDTH = 12, 0.3, 192
STEPS = (60, 105, 180, 315, 550, 960)
WORDS = [steps * tag_models.BATCH * PIECE for steps in STEPS]


class Keep(TrainerCallback):
    """Copies of the weights after the steps."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copies them after one of the steps."""
        if state.global_step in STEPS:
            self.kept.append({name: value.clone() for name, value in kwargs["model"].state_dict().items()})


def pieces(text: list[int], shuffled: bool, seed: int) -> list[Row]:
    """The pieces of a text in random order, as rows."""
    rng = np.random.default_rng(seed)
    whole = rng.permutation(np.array(text[: len(text) // PIECE * PIECE]).reshape(-1, PIECE))
    if shuffled:
        whole = rng.permuted(whole, axis=1)
    seen = np.where(rng.random(whole.shape) < HIDDEN, UNKNOWN, whole)
    return [{"input_ids": a, "labels": b} for a, b in zip(seen.tolist(), whole.tolist(), strict=True)]


def pretrained(text: list[int], shuffled: bool, seed: int, output: str) -> list[dict[str, Any]]:
    """The weights after each of the steps.

    Raises:
        ValueError: The text has too few pieces to be read once.
    """
    rows, keep = pieces(text, shuffled, seed), Keep()
    if len(rows) < STEPS[-1] * tag_models.BATCH:
        raise ValueError(f"text has {len(rows)} pieces, and {STEPS[-1]} steps read more: pass a longer text")
    constant = {"lr_scheduler_type": "constant_with_warmup", "train_sampling_strategy": "sequential"}
    tag_models.train(tag_models.new(WIDTH, WIDTH, seed), rows, STEPS[-1], seed, output, callbacks=[keep], **constant)
    return keep.kept

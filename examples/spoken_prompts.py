"""English prompts of Asterisk as rows for siamese_ctc.py and speech_translation.py."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from hf_xent.data import asterisk
from hf_xent.speech import log_mel, read_wav, standardized

LONGEST, TEST = 2.0, 60
BINS, STACK = 40, 4
PAD, START, END = 0, 1, 2
LETTERS = " abcdefghijklmnopqrstuvwxyz'àâäæçèéêëîïôœùûü"
VOCABULARY = len(LETTERS) + 3


def spelled(text: str) -> list[int]:
    """Ids of a text's letters, in lower case; other characters are spaces."""
    kept = "".join(letter if letter in LETTERS else " " for letter in text.lower().replace("\u2019", "'"))
    return [LETTERS.index(letter) + 3 for letter in " ".join(kept.split())]


def written(ids: Any) -> str:
    """The text of ids, until the end."""
    ids = [int(i) for i in ids]
    ids = ids[: ids.index(END)] if END in ids else ids
    return "".join(LETTERS[i - 3] for i in ids if i > END)


@cache
def rows(folder: str) -> list[dict[str, Any]]:
    """Prompts of up to LONGEST seconds that are in both languages, one for each English text."""
    found: dict[str, dict[str, Any]] = {}
    for pair in asterisk.parallel(folder):
        wave, rate = read_wav(pair["file_en"])
        english, french = spelled(pair["text_en"]), spelled(pair["text_fr"])
        if not english or not french or len(wave) > LONGEST * rate:
            continue
        frames = standardized(log_mel(wave, rate, BINS))
        frames = frames[: len(frames) // STACK * STACK].reshape(-1, STACK * BINS)
        text = {"labels": english, "text_input_ids": english, "french": french}
        found.setdefault(written(english), {"input_features": frames, **text})
    return list(found.values())


def split(folder: str, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the training, and TEST others."""
    every = rows(folder)
    order = np.random.default_rng(seed).permutation(len(every))
    return [every[i] for i in order[TEST:]], [every[i] for i in order[:TEST]]

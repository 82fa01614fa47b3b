"""Parallel text of programs: short messages and their translations in any folder of .mo files; nothing is shipped.

    apt-get download gimp-data evolution-common gnucash-common vlc-l10n ... && for x in *.deb; do dpkg -x $x mo; done

or the folder of Django, or /usr/share/locale. Files are `.../LANGUAGE/LC_MESSAGES/*.mo`, read with Python's gettext.
Texts are in lower case, without the marks of shortcut keys, and with a space before them, as sub-words expect; messages
with placeholders are left out, and so are pairs with words that fewer than `often` pairs have. The first translation of
a message counts. For noisy_translation.py.
"""

from __future__ import annotations

import gettext
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

MARKS = str.maketrans({"_": "", "&": "", "…": "", "\u2019": "'", "\xa0": " "})
SOURCE, TARGET = range(2, 7), range(2, 9)  # numbers of words
END, PAD = 0, 1
Pairs = dict[str, str]


class Parts(NamedTuple):
    """Pairs by use."""

    train: Pairs
    validation: Pairs
    test: Pairs


def read(folder: Path, language: str, often: int = 8) -> Pairs:
    """All pairs of a folder. Raises: ValueError if it has none."""
    pairs: Pairs = {}
    for file in sorted(folder.rglob(f"{language}/LC_MESSAGES/*.mo")):
        with file.open("rb") as stream:
            messages = gettext.GNUTranslations(stream)._catalog  # type: ignore[attr-defined]  # there is no other way
        for message, translation in messages.items():
            if isinstance(message, str):  # a tuple has the forms of numbers
                pair = spelled(message.rpartition("\x04")[2]), spelled(translation)  # what precedes \x04 is a context
                if fits(*pair):
                    pairs.setdefault(*pair)
    for _ in range(3):  # what is left out makes other words rare
        counts = [Counter(word for text in side for word in text.split()) for side in (pairs.keys(), pairs.values())]
        pairs = {
            pair[0]: pair[1] for pair in pairs.items()
            if all(count[word] >= often for count, text in zip(counts, pair, strict=True) for word in text.split())
        }  # fmt: skip
    if not pairs:
        raise ValueError(f"folder is {folder}, which has no pairs of '{language}': it needs LANGUAGE/LC_MESSAGES/*.mo")
    return pairs


def spelled(text: str) -> str:
    return " ".join(text.translate(MARKS).replace("...", "").lower().split()).rstrip(" .:!")


def fits(source: str, target: str) -> bool:
    sizes = len(source.split()) in SOURCE and len(target.split()) in TARGET
    return sizes and source != target and all(x.isalpha() or x in " '-," for x in source + target)


def split(pairs: Pairs, held: int, seed: int = 0) -> Parts:
    """Validation and test get `held` pairs each."""
    order = [sorted(pairs)[i] for i in np.random.default_rng(seed).permutation(len(pairs))]
    parts = order[2 * held :], order[:held], order[held : 2 * held]
    return Parts(*({source: pairs[source] for source in part} for part in parts))


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch, padded."""
    fills = {"input_ids": PAD, "labels": -100}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], True, fill)
        for name, fill in fills.items()
    }
    return {**batch, "attention_mask": (batch["input_ids"] != PAD).long()}

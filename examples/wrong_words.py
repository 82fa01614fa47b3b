"""Sentences of a corpus of which a known share of words is wrong, and six formats that ask a model how good one is.

texts, degrees = sentences("brown:package", seed=0, count=60)
"""

from __future__ import annotations

import re

import numpy as np

from hf_xent.data import Format, load_text

MOST = 4
CRITERIA = {"grammar": "grammatical", "meaning": "meaningful", "ease": "easy to read"}
SHOWN, DIGITS, LETTERS = 'Sentence: "{text}"\nHow {criterion} is it', tuple("12345"), tuple("ABCDE")
WORDS = ("never", "little", "some", "much", "always")
FORMATS = {
    "digits": Format(SHOWN + ", from 1 (lowest) to 5 (highest)? Digit only.", DIGITS),
    "digits turned": Format(SHOWN + ", from 1 (highest) to 5 (lowest)? Digit only.", DIGITS[::-1]),
    "letters": Format(SHOWN + "? A not, B little, C partly, D mostly, E fully. Letter only.", LETTERS),
    "letters turned": Format(SHOWN + "? A fully, B mostly, C partly, D little, E not. Letter only.", LETTERS[::-1]),
    "words": Format(SHOWN + "? One word of never, little, some, much, always.", WORDS),
    "marks": Format(SHOWN + "? School mark: A (best), B, C, D or F. Letter only.", tuple("FDCBA")),
}
"""Verdicts from the lowest to the highest; 'turned' names them in the other order."""


def sentences(corpus: str, seed: int, count: int) -> tuple[list[str], np.ndarray]:
    """Sentences of 8 to 14 plain words, and their degrees from 0 to MOST; degree / MOST of the words are others'."""
    lines = [line.strip() for text in load_text(corpus)["text"] for line in text.split("\n")]
    plain = sorted({line[:-2] for line in lines if re.fullmatch(r"[A-Z][a-z]*( [a-z]+){7,13} \.", line)})
    draw, words = np.random.default_rng(seed), [word for line in plain for word in line.split()[1:]]
    found, degrees = [], np.arange(count) % (MOST + 1)
    for line, degree in zip(draw.choice(plain, count, replace=False), degrees, strict=True):
        new = str(line).split()
        for place in draw.permutation(len(new))[: round(len(new) * degree / MOST)]:
            new[place] = str(draw.choice(words))
        found.append(" ".join(new).capitalize() + ".")
    return found, degrees

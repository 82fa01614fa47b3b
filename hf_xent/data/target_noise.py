"""Noise in the targets of generation, at a known share of words: their order, repeats, blanks.

    noise = TargetNoise("shuffle", share=0.5, seed=0, column="fr")
    noisy = rows.map(noise, with_indices=True)              # a new column of the same name; sources are not touched

Of the n words of a target, k are picked at random, without replacement: share n rounded down, and one more with the
probability of what is left, so that k has the mean share n exactly. What happens to picked words:

    shuffle     they trade places: each moves to the place of another one, along a random cycle (one alone cannot: where
                k is 1, two words trade places or none, with equal probability); within blocks if there is a `window`
    repeat      each is said twice
    blank       each is replaced by `blank`, or dropped without one; the last word of a target is not dropped
    combined    each gets one of the three, at random; one alone that would be shuffled is repeated or blanked

A word is what whitespace separates, or one token id where the column has ids. -100 and the ids in `kept` (an end token)
are no words, and stay behind the words before them. Conversations are noisy in the assistant's turns. Which words are
picked depends on the seed and the row's number alone, on every machine. Words that trade places with equal ones leave
no trace, so the share of words that differ may be smaller than `share`.

Source: the kinds of noise are those of Liu et al. 2022, arXiv:2106.15078; how much of them a share is, is this
    project's choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from ..options.ranges import check_count, check_number, check_text, is_integer

Words = list[Any]
"""Words of one target, as text or as token ids."""
Change = Callable[[Words, list[int], Random, Words], list[Words]]
"""Of words, picked places in random order, a generator, and what a blank is: the 0 to 2 words at every place."""


def shuffled(words: Words, picked: list[int], random: Random, empty: Words) -> list[Words]:
    """Picked words move to each other's places, along the cycle of `picked`."""
    found = [[word] for word in words]
    for start, end in zip(picked, [*picked[1:], *picked[:1]], strict=True):
        found[end] = [words[start]]
    return found


def repeated(words: Words, picked: list[int], random: Random, empty: Words) -> list[Words]:
    """Picked words are said twice."""
    return [[word] * (1 + (place in picked)) for place, word in enumerate(words)]


def blanked(words: Words, picked: list[int], random: Random, empty: Words) -> list[Words]:
    """Picked words are replaced by the blank, or dropped, but not all words of a target."""
    if not empty and len(picked) == len(words):
        picked = picked[1:]
    return [empty if place in picked else [word] for place, word in enumerate(words)]


def combined(words: Words, picked: list[int], random: Random, empty: Words) -> list[Words]:
    """Each picked word is shuffled, repeated or blanked."""
    kinds = [random.choice((shuffled, repeated, blanked)) for _ in picked]
    if kinds.count(shuffled) == 1:
        kinds[kinds.index(shuffled)] = random.choice((repeated, blanked))
    found = [[word] for word in words]
    for kind in (shuffled, repeated, blanked):
        places = [place for place, own in zip(picked, kinds, strict=True) if own is kind]
        changed = kind(words, places, random, empty)
        for place in places:
            found[place] = changed[place]
    return found


NOISES: dict[str, Change] = {"shuffle": shuffled, "repeat": repeated, "blank": blanked, "combined": combined}
"""Name -> what happens to picked words."""


@dataclass(frozen=True)
class TargetNoise:
    """Noise for `datasets.Dataset.map(noise, with_indices=True)`, or for one target; see the module's docstring.

    Args:
        kind: A name of `NOISES`.
        share: The share of words that are picked, from 0, which changes nothing, to 1.
        seed: Of what is drawn.
        column: The column of the targets: text, token ids, or a conversation (a list of messages).
        window: Words trade places within blocks of this many words, the last one longer by what is left; None for
            the whole target. For 'shuffle' alone.
        blank: What replaces a blanked word, text or an id as in the column; None drops it. For 'blank' and 'combined'.
        kept: Token ids that are no words, such as that of the end token.

    Raises:
        ValueError: A field has a value out of its range, or would have no effect.
    """

    kind: str
    share: float
    seed: int = 0
    column: str = "labels"
    window: int | None = None
    blank: str | int | None = None
    kept: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_text(self, "column")
        if self.kind not in NOISES:
            raise ValueError(f"kind is {self.kind!r}: choose one of {', '.join(NOISES)}")
        check_number(self, "share", "[0, 1]")
        check_count("seed", self.seed, 0)
        if self.window is not None:
            check_count("window", self.window, 2)
        read = {"window": ("shuffle",), "blank": ("blank", "combined")}
        for name, kinds in read.items():
            if getattr(self, name) is not None and self.kind not in kinds:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but kind is {self.kind!r}, which does not read it"
                )
        object.__setattr__(self, "kept", tuple(self.kept))  # a list is not hashable

    def __call__(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        """The noisy column of a row.

        Raises:
            ValueError: The row does not have the column, or its value is no text, no ids and no conversation.
        """
        if self.column not in row:
            raise ValueError(f"column is {self.column!r}, but a row has {', '.join(row)}: name the column of targets")
        return {self.column: self.of(row[self.column], index)}

    def of(self, target: Any, index: int) -> Any:
        """The noisy version of one target.

        Args:
            target: Text, a list of token ids, or a list of messages with `role` and `content`.
            index: The number of its row.

        Returns:
            The target in the same form; the same object if no word is picked.

        Raises:
            ValueError: It has another form.
        """
        return self._noisy(target, Random(f"{self.seed}, {index}: target noise"))  # of text, the same everywhere

    def _noisy(self, target: Any, random: Random) -> Any:
        if isinstance(target, str):
            words = target.split()
            found = self._words(words, random)
            return target if found == words else " ".join(found)
        if isinstance(target, Sequence) and all(isinstance(item, Mapping) for item in target):
            return [
                {**turn, "content": self._noisy(turn["content"], random)} if turn["role"] == "assistant" else turn
                for turn in target
            ]
        if isinstance(target, Sequence) and all(is_integer(item) for item in target):
            return self._ids([*target], random)
        raise ValueError(f"a target is {str(target)[:40]!r}: give text, a list of token ids, or a list of messages")

    def _ids(self, ids: list[int], random: Random) -> list[int]:
        """Ids whose words are noisy; what is kept stays behind the same words."""
        fixed = {-100, *self.kept}
        places = [place for place, one in enumerate(ids) if one not in fixed]
        changed = iter(self._changed([ids[place] for place in places], random))
        return [one for item in ids for one in ([item] if item in fixed else next(changed))]

    def _words(self, words: Words, random: Random) -> Words:
        return [word for group in self._changed(words, random) for word in group]

    def _changed(self, words: Words, random: Random) -> list[Words]:
        """The words at every place."""
        found: list[Words] = []
        for start, end in self._blocks(len(words)):
            block = words[start:end]
            picked = random.sample(range(len(block)), self._count(len(block), random))
            found += NOISES[self.kind](block, picked, random, [] if self.blank is None else [self.blank])
        return found

    def _count(self, length: int, random: Random) -> int:
        """How many of so many words are picked: `share` of them in the mean."""
        whole = math.floor(self.share * length)
        count = whole + (random.random() < self.share * length - whole)
        if self.kind == "shuffle" and count == 1:
            return 0 if length < 2 or random.random() < 0.5 else 2
        return count

    def _blocks(self, length: int) -> list[tuple[int, int]]:
        """Where blocks of words start and end."""
        if self.window is None or length < 2 * self.window:
            return [(0, length)]
        starts = [*range(0, length - self.window + 1, self.window)]
        return [*zip(starts, [*starts[1:], length], strict=True)]

"""Two generators without a network: an n-gram model with Kneser-Ney smoothing, and words replaced by synonyms."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

DISCOUNT, SHARE = 0.75, 0.3


class KneserNey:
    """An interpolated trigram model of words; it samples without computing a probability.

    A follower w of the context h is drawn with c(h w) / c(h), and kept with 1 - DISCOUNT / c(h w); else the next
    shorter context draws. So w has the probability max(c(h w) - D, 0) / c(h) + D N(h) / c(h) p(w | shorter h), where
    N(h) is the number of distinct followers: Kneser-Ney's, since shorter contexts count distinct continuations.

    Args:
        texts: What the model is counted on.
    """

    def __init__(self, texts: Iterable[str]):
        self.followers: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for text in texts:
            words = text.split()
            for triple in zip(words, words[1:], words[2:], strict=False):
                self.followers[triple[:2]].append(triple[2])
        pairs = {(first[1], word) for first, words in self.followers.items() for word in words}
        for first, words in list(self.followers.items()):
            for word in set(words):
                self.followers[first[1:]].append(word)
        self.followers[()] = [word for _, word in sorted(pairs)]
        for context in list(self.followers):
            self.followers[context].sort()  # sets have no order that a seed could repeat

    def next(self, context: tuple[str, ...], rng: random.Random) -> str:
        """A word after a context of up to two."""
        words = self.followers.get(context)
        if words:
            word = rng.choice(words)
            if not context or rng.random() >= DISCOUNT / words.count(word):
                return word
        return self.next(context[1:], rng)

    def sample(self, prompt: str, count: int, seed: int) -> str:
        """`count` words after a prompt."""
        words, rng = prompt.split(), random.Random(seed)
        start = len(words)
        while len(words) < start + count:
            words.append(self.next(tuple(words[-2:]), rng))
        return " ".join(words[start:])


def synonyms(wordnet: Path) -> dict[str, list[str]]:
    """Word -> the other single words of its synsets, of the files data.noun, data.verb, data.adj and data.adv."""
    table: dict[str, set[str]] = defaultdict(set)
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (wordnet / f"data.{kind}").read_text(encoding="utf-8").splitlines():
            if line[:1].isdigit():
                fields = line.split(" ")
                words = [word.split("(")[0] for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
                single = [word for word in words if word.isalpha() and word.islower()]
                for word in single:
                    table[word].update(other for other in single if other != word)
    return {word: sorted(others) for word, others in table.items() if others and len(word) > 3}


def reworded(text: str, table: dict[str, list[str]], seed: int, share: float = SHARE) -> str:
    """The text with a share of the words that have a synonym replaced by one of them."""
    rng = random.Random(seed)
    return " ".join(rng.choice(table[w]) if w in table and rng.random() < share else w for w in text.split())

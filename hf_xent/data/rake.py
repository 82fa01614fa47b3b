"""RAKE: the key phrases of a text, and the text without its most important ones.

Stop words, and anything but spaces between words, split a text into phrases. Over the phrases that contain a word,

    score(word) = sum of their lengths / their number          score(phrase) = sum of its words' scores

both counted with repetition, in lower case. Equal scores rank in order of first occurrence (our choice). The stop words
are scikit-learn's English list by default.

Source: Rose et al. 2010, Automatic keyword extraction from individual documents, in Text Mining (Wiley), chapter 1.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Sequence

WORD = re.compile(r"\w+(?:['’-]\w+)*")  # noqa: RUF001  the apostrophe as typesetters have it
SPACES = re.compile(r"[ \t]+")


def phrases(text: str, stop_words: Collection[str] | None = None) -> dict[str, float]:
    """Key phrases of a text in lower case with their scores, best first.

    Args:
        text: Any text.
        stop_words: Stop words in lower case; None for scikit-learn's English list.

    Returns:
        Phrase -> score.
    """
    occurrences = [phrase for phrase, _ in _occurrences(text, stop_words)]
    number: Counter[str] = Counter()
    lengths: Counter[str] = Counter()
    for phrase in occurrences:
        words = phrase.split()
        number.update(words)
        lengths.update({word: words.count(word) * len(words) for word in set(words)})
    scores = {phrase: sum(lengths[word] / number[word] for word in phrase.split()) for phrase in occurrences}
    return dict(sorted(scores.items(), key=lambda item: -item[1]))  # sorted is stable: ties keep their order


def without(
    text: str, shares: Sequence[float], stop_words: Collection[str] | None = None, *, shuffled: bool = False
) -> list[str]:
    """The text without given shares of its key phrases, best first; extra spaces that this leaves are removed too.

    Of K phrases, the first round(share K) are removed wherever they occur, so a share of 0 returns the text itself.

    Args:
        text: Any text.
        shares: Shares of its key phrases, each from 0 to 1.
        stop_words: Stop words in lower case; None for scikit-learn's English list.
        shuffled: Whether phrases are removed in a random order, which is always the same for a text, as a control.

    Returns:
        One text for each share.

    Raises:
        ValueError: For a share outside of [0, 1].
    """
    if wrong := [share for share in shares if not 0 <= share <= 1]:
        raise ValueError(f"shares has {wrong[0]}: choose numbers from 0 to 1")
    ranked = list(phrases(text, stop_words))
    if shuffled:
        random.Random(text).shuffle(ranked)
    spans = _occurrences(text, stop_words)
    return [_cut(text, spans, set(ranked[: round(share * len(ranked))])) for share in shares]


def _cut(text: str, spans: list[tuple[str, tuple[int, int]]], removed: set[str]) -> str:
    if not removed:
        return text
    shortened = text
    for phrase, (start, end) in reversed(spans):
        if phrase in removed:
            shortened = shortened[:start] + shortened[end:]
    shortened = re.sub(r"[ \t]+([.,;:!?])", r"\1", SPACES.sub(" ", shortened))
    return shortened if text[0].isspace() else shortened.lstrip(" ")


def _occurrences(text: str, stop_words: Collection[str] | None) -> list[tuple[str, tuple[int, int]]]:
    """(phrase, (start, end)) in order: runs of words with only spaces between them, without stop words."""
    if stop_words is None:
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # lazy: a second

        stop_words = ENGLISH_STOP_WORDS
    runs: list[list[re.Match[str]]] = [[]]
    end = 0
    for word in WORD.finditer(text):
        is_stop_word = word.group().lower() in stop_words
        if is_stop_word or text[end : word.start()].strip(" \t"):
            runs.append([])
        if not is_stop_word:
            runs[-1].append(word)
        end = word.end()
    return [(" ".join(w.group().lower() for w in run), (run[0].start(), run[-1].end())) for run in runs if run]

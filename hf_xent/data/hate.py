"""'hate': 135,556 ratings of 39,565 comments from social media by 7,912 people, on ten ordered items of hate speech.

Items: sentiment, respect, insult, humiliate, status, dehumanize, violence, genocide, attack_defend, hatespeech, as
whole numbers. The publishers' measure of a comment, hate_speech_score (higher is more hateful), is that of a many-facet
Rasch model of these items and raters. `hf_xent.rasch.stack(rows, hate.ITEMS, keep=["rater"], unit="unit")` makes the
table that `hf_xent.rasch.fit` reads.

Source: Kennedy et al. 2020, Constructing interval variables via faceted Rasch measurement and multitask deep learning:
a hate speech application, arXiv:2009.10277; Hub ucberkeley-dlab/measuring-hate-speech (CC BY 4.0).
Columns: text, comment_id, annotator_id, the ten items, hate_speech_score. Data: text, unit, rater, the items, score.
"""

from __future__ import annotations

from typing import Any

from .corpus import Corpus, checked_text

ITEMS = (
    "sentiment", "respect", "insult", "humiliate", "status", "dehumanize", "violence", "genocide", "attack_defend",
    "hatespeech",
)  # fmt: skip
"""The columns of ordered answers."""


class Ratings(Corpus):
    """A row is what one rater said of one text."""

    def features(self) -> Any:
        """Text, whom and what the answers are of, ten whole numbers, and the published measure."""
        from datasets import Features, Value

        number = Value("int64")
        ends = {"text": Value("string"), "unit": number, "rater": number}
        return Features({**ends, **dict.fromkeys(ITEMS, number), "score": Value("float64")})


def _row(row: dict[str, Any]) -> dict[str, Any]:
    answers = {item: _whole(item, row[item]) for item in ITEMS}
    names = {"unit": _whole("comment_id", row["comment_id"]), "rater": _whole("annotator_id", row["annotator_id"])}
    return {"text": checked_text(row["text"]), **names, **answers, "score": float(row["hate_speech_score"])}


def _whole(name: str, value: Any) -> int:
    """A whole number, which is published as a float; Raises: ValueError for any other."""
    if value is None or value != value:
        raise ValueError(f"a row has no {name}: the copy is broken")
    if float(value) % 1:
        raise ValueError(f"a row has the {name} {value!r}: it is a whole number; the copy is broken")
    return int(float(value))


CORPUS = Ratings(
    title="Measuring hate speech",
    family="ratings",
    license="cc-by-4.0",
    caveat=(
        "Hateful comments as they were posted, and what people said of them, with their ids: the texts offend, and some"
        " name those they attack. Cite the paper, as the licence asks."
    ),
    source="https://huggingface.co/datasets/ucberkeley-dlab/measuring-hate-speech",
    row=_row,
    columns=("text", "comment_id", "annotator_id", *ITEMS, "hate_speech_score"),
    splits={"train": 135_556},
    repo="ucberkeley-dlab/measuring-hate-speech",
)

